"""The published keys verify the local issuer's tokens, and no others."""

from __future__ import annotations

import jwt
import pytest

from local import lifecycle
from local.environment import LocalCloudError
from local.tokens import AUDIENCE, LIFETIME_SECONDS, PEOPLE, SECOND_PEOPLE, Issuer, TokenRequestError


@pytest.fixture(scope="module")
def issuer():
    return Issuer.create("http://localhost:8000")


def decode(token, issuer):
    key = jwt.PyJWKSet.from_dict(issuer.key_set())[jwt.get_unverified_header(token)["kid"]]
    return jwt.decode(token, key, algorithms=["RS256"], audience=AUDIENCE, issuer=issuer.url)


@pytest.mark.parametrize("role", PEOPLE)
def test_each_role_is_a_separate_person(issuer, role):
    claims = decode(issuer.token(role), issuer)
    assert (claims["sub"], claims["scope"]) == (PEOPLE[role], role)
    assert claims["exp"] - claims["iat"] == LIFETIME_SECONDS
    assert len(set(PEOPLE.values())) == len(PEOPLE)


def test_person_may_have_several_roles(issuer):
    claims = decode(issuer.token("requester approver", subject="dave"), issuer)
    assert (claims["sub"], claims["scope"]) == ("dave", "requester approver")


def test_old_token_has_expired(issuer):
    with pytest.raises(jwt.ExpiredSignatureError):
        decode(issuer.token("requester", now=1_600_000_000), issuer)


def test_token_of_another_issuer_is_unknown(issuer):
    with pytest.raises(KeyError):
        decode(Issuer.create(issuer.url).token("requester"), issuer)


def test_published_key_is_public_only(issuer):
    (key,) = issuer.key_set()["keys"]
    assert not {"d", "p", "q", "dp", "dq", "qi"} & key.keys()
    assert (key["alg"], key["use"]) == ("RS256", "sig")


def test_token_of_a_second_person_has_another_subject(issuer):
    for role, subject in SECOND_PEOPLE.items():
        assert decode(issuer.token(role, subject=subject), issuer)["sub"] not in PEOPLE.values()
    assert set(SECOND_PEOPLE) <= set(PEOPLE)


def test_issuer_signs_the_same_after_export_and_restore(issuer):
    restored = Issuer.restore(issuer.export())
    assert restored.key_set() == issuer.key_set()
    assert decode(restored.token("auditor"), issuer)["sub"] == PEOPLE["auditor"]


@pytest.mark.parametrize(
    ("role", "subject", "expected"),
    [
        ("operator", "", ("olivia", "operator")),
        ("operator", "oscar", ("oscar", "operator")),
        (" requester  auditor ", "dave", ("dave", "requester auditor")),
    ],
)
def test_make_token_prints_an_accepted_token(issuer, tmp_path, role, subject, expected):
    path = tmp_path / "issuer.json"
    path.write_text(issuer.export())
    claims = decode(lifecycle.token(role, subject, path), issuer)
    assert (claims["sub"], claims["scope"]) == expected


@pytest.mark.parametrize(
    ("role", "subject", "field"), [("", "", "ROLE"), ("admin", "x", "ROLE"), ("requester auditor", "", "SUBJECT")]
)
def test_make_token_names_the_wrong_variable(issuer, role, subject, field):
    with pytest.raises(TokenRequestError, match=field):
        issuer.requested_token(role, subject)


def test_make_token_names_make_up_when_nothing_runs(tmp_path):
    with pytest.raises(LocalCloudError, match="make up"):
        lifecycle.token("operator", "", tmp_path / "issuer.json")
