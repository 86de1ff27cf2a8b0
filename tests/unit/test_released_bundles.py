"""Genuine bundles from before the policy's entries: they verify, and the report is the same to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bundles import LOG_ID, Anchorer, load_verifier

BUNDLES = sorted((Path(__file__).parents[1] / "releases" / "bundles").glob("*.json"))


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.stem)
def test_released_bundle_has_the_same_report(path: Path) -> None:
    """The reports are those of the verifier at the time; never write them anew."""
    lines = load_verifier().verify(path.read_bytes(), log_id=LOG_ID, anchor_identity=Anchorer().identity, open_=True)
    assert "\n".join(lines) + "\n" == path.with_suffix(".txt").read_text()


def test_released_bundles_exist() -> None:
    assert len(BUNDLES) == 3
