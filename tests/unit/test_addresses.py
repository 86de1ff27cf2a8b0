"""Which URLs and addresses the dispatcher accepts, one by one."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain.addresses import is_acceptable, parse_url
from qaes.domain.errors import InvalidInputError

PUBLIC = ["93.184.216.34", "8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001:80b::200e", "64:ff9b::808:808"]
PUBLIC += ["::ffff:8.8.8.8", "169.253.255.255", "172.32.0.1", "100.128.0.1"]
NOT_PUBLIC = {
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"],
    "carrier": ["100.64.0.1", "100.100.100.200"],
    "this network": ["0.0.0.1", "0.1.2.3"],
    "link-local": ["169.254.1.1", "fe80::1", "fe80::1%eth0", "febf::1"],
    "metadata": ["169.254.169.254", "169.254.170.2", "fd00:ec2::254", "168.63.129.16", "192.0.0.192"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "benchmark": ["198.18.0.1", "2001:2::1"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255"],
    "relay": ["192.88.99.1"],
    "unique local": ["fc00::1", "fdff::1"],
    "site local": ["fec0::1"],
    "mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"],
    "compatible": ["::127.0.0.1", "::8.8.8.8", "::"],
    "NAT64": ["64:ff9b::a00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::a00:1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "translated": ["::ffff:0:127.0.0.1"],
    "not allocated": ["4000::1", "8000::1", "5f00::1", "100::1"],
}
LOOPBACK = ["127.0.0.1", "127.255.255.254", "::1"]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_accepted(address: str) -> None:
    assert is_acceptable(ip_address(address))


@pytest.mark.parametrize("address", [each for group in NOT_PUBLIC.values() for each in group])
def test_address_that_is_not_public_is_refused(address: str) -> None:
    assert not is_acceptable(ip_address(address))
    if not address.startswith(("64:ff9b::7f", "::ffff:127")):
        assert not is_acceptable(ip_address(address), allow_local=True)


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_is_accepted_only_when_local_is_allowed(address: str) -> None:
    assert not is_acceptable(ip_address(address))
    assert is_acceptable(ip_address(address), allow_local=True)


@given(st.ip_addresses(v=4))
def test_mapped_and_translated_addresses_follow_the_inner_one(address: object) -> None:
    for form in (f"::ffff:{address}", f"64:ff9b::{address}"):
        assert is_acceptable(ip_address(form)) == is_acceptable(ip_address(str(address)))


ACCEPTED = [
    "https://actions.example.com",
    "https://actions.example.com/",
    "https://actions.example.com/refund?tenant=7",
    "https://actions.example.com:8443/v1/refund%2Fnow",
    "https://xn--bcher-kva.example/refund",
    "https://93.184.216.34/refund",
    "https://[2606:4700::1111]/refund",
]
REFUSED = [
    *("http://actions.example.com/", "ftp://actions.example.com/", "file:///etc/passwd", "//actions.example.com/"),
    *("https:/actions.example.com/", "https://", "", "actions.example.com", "https:actions.example.com"),
    *("https://localhost/", "https://localhost:8443/", "https://metadata/", "https://intern/", "https://a.b./"),
    *("https://127.0.0.1/", "https://10.0.0.1/", "https://169.254.169.254/latest/meta-data/", "https://[::1]/"),
    *("https://[::ffff:10.0.0.1]/", "https://[fe80::1%25eth0]/", "https://[fd00:ec2::254]/", "https://[::]/"),
    *("https://2130706433/", "https://0x7f000001/", "https://0x7f.1/", "https://017700000001/", "https://0177.0.0.1/"),
    *("https://127.1/", "https://127.0.1/", "https://example.0x7f/", "https://1.2.3.4.5/", "https://0/"),
    *("https://134744072/", "https://8.8.2056/", "https://008.8.8.8/", "https://[2606:4700:0::1111]/"),
    *("https://user@actions.example.com/", "https://user:password@actions.example.com/", "https://@a.example/"),
    *("https://actions.example.com@127.0.0.1/", "https://actions.example.com\\@127.0.0.1/"),
    *("https://actions.example.com#@127.0.0.1/", "https://actions.example.com/#top"),
    *("https://bücher.example/", "https://ⓔxample.com/", "https://\uff11\uff12\uff17.0.0.1/", "https://127。0。0。1/"),
    *("https://EXAMPLE.com/", "HTTPS://example.com/", "https://exam_ple.com/", "https://-a.example/", "https://a-.b/"),
    *("https://a.localhost/", "https://db.internal/", "https://printer.local/", "https://nas.home.arpa/"),
    *("https://a..example/", "https://.example/", "https://" + "a" * 64 + ".example/", "https://" + "a." * 127 + "bb/"),
    *("https://a.example:0/", "https://a.example:22/", "https://a.example:25/", "https://a.example:65536/"),
    *("https://a.example:80/", "https://a.example:/", "https://a.example:0443/", "https://a.example:443443/"),
    *("https://a.example/ x", " https://a.example/", "https://a.example/\n", "https://a.example/\r\nHost: b"),
    *("https://a.example/\x00", "https://a.example/%zz", "https://a.example/%2f", "https://a.example/<x>", "https://a.example\t/"),
    "https://a.example/" + "x" * 2048,
]  # fmt: skip


@pytest.mark.parametrize("text", ACCEPTED)
def test_url_is_accepted(text: str) -> None:
    url = parse_url(text)
    assert url == parse_url(str(url))
    assert str(url) == (text if text.count("/") > 2 else text + "/")


@pytest.mark.parametrize("text", REFUSED)
def test_url_is_refused_with_advice(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_url(text)
    assert caught.value.field == "url"
    assert caught.value.message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("https://user:pw@a.example/", "user name"),
        ("https://bücher.example/", "xn--"),
        ("https://a.example/#x", "fragment"),
        ("https://0x7f.1/", "usual form"),
        ("https://10.0.0.1/", "not a public address"),
        ("http://a.example/", "https://"),
        ("https://a.example:22/", "port"),
        ("https://metadata/", "complete domain name"),
    ],
)
def test_refused_url_names_the_fix(text: str, part: str) -> None:
    with pytest.raises(InvalidInputError, match=part):
        parse_url(text)


@pytest.mark.parametrize(
    "text", ["http://localhost:9/x", "http://127.0.0.1/", "https://localhost:22/", "http://[::1]:80/"]
)
def test_local_stage_allows_loopback_and_http(text: str) -> None:
    assert parse_url(text, allow_local=True)
    with pytest.raises(InvalidInputError):
        parse_url(text)


@pytest.mark.parametrize(
    "text",
    ["http://a.example/", "https://10.0.0.1/", "http://169.254.169.254/", "https://a.example:22/", "http://127.1/"],
)
def test_local_stage_allows_nothing_else(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_url(text, allow_local=True)
