"""Proofs from tiles: the same as the RFC's, with few reads."""

from __future__ import annotations

from collections import Counter
from math import ceil, log

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qaes.domain.errors import InvalidInputError
from qaes.domain.merkle import EMPTY_ROOT, ProofError, leaf_digest, root_of, verify_consistency, verify_inclusion
from qaes.domain.tiles import (
    TILE_WIDTH,
    appended,
    consistency_proof,
    inclusion_proof,
    parse_tile_path,
    tile_path,
    tile_root,
    tile_width,
    tree_root,
)
from tests.unit.test_merkle import made_up, mth, path, subproof

LEAVES = made_up(700)
LARGE = made_up(66_000)


class Log:
    """Tiles in memory, as a table would keep them, with a count of reads."""

    def __init__(self) -> None:
        self.size = 0
        self.tiles: dict[tuple[int, int], bytes] = {}
        self.reads: Counter[tuple[int, int]] = Counter()

    def append(self, leaves: list[bytes]) -> dict[tuple[int, int], bytes]:
        changed = appended(self.size, leaves, self.read)
        for place, content in changed.items():
            assert content.startswith(self.tiles.get(place, b""))  # a tile only grows
        self.tiles |= changed
        self.size += len(leaves)
        return changed

    def read(self, level: int, index: int, width: int) -> bytes:
        self.reads[level, index] += 1
        assert 0 < width <= TILE_WIDTH
        return self.tiles[level, index]


def log_of(leaves: list[bytes], batch: int = 256) -> Log:
    log = Log()
    for at in range(0, len(leaves), batch):
        log.append(leaves[at : at + batch])
    return log


SMALL_LOG = log_of(LEAVES, batch=7)
LARGE_LOG = log_of(LARGE)


@given(st.lists(st.integers(0, 300), max_size=6))
@example([256, 0, 256])
@example([1] * 5)
def test_tiles_do_not_depend_on_the_batches(batches: list[int]) -> None:
    log, size = Log(), sum(batches)
    leaves = (LEAVES * 3)[:size]
    at = 0
    for batch in batches:
        log.append(leaves[at : at + batch])
        at += batch
    assert log.tiles == log_of(leaves, batch=10_000).tiles
    assert tree_root(size, log.read) == root_of(leaves)


def test_tiles_of_the_specification_s_example() -> None:
    # "273 full level 0 tiles, one partial level 0 tile of width 112, one full level 1 tile, one partial level 1 tile of
    # width 17, and one partial level 2 tile of width 1"
    widths = [
        [tile_width(level, index, 70_000) for index in range(280) if tile_width(level, index, 70_000)]
        for level in range(4)
    ]
    assert widths == [[256] * 273 + [112], [256, 17], [1], []]
    assert {place: len(tile) // 32 for place, tile in log_of(LEAVES[:256]).tiles.items()} == {(0, 0): 256, (1, 0): 1}


def test_empty_batch_changes_nothing_and_reads_nothing() -> None:
    assert appended(700, [], pytest.fail) == {}
    assert tree_root(0, pytest.fail) == EMPTY_ROOT


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 700), st.data())
@example(256, None)
@example(257, None)
@example(512, None)
def test_proofs_are_those_of_the_rfc(size: int, data: st.DataObject | None) -> None:
    index = data.draw(st.integers(0, size - 1)) if data else size - 1
    leaves = LEAVES[:size]
    assert tree_root(size, SMALL_LOG.read) == mth(leaves)
    assert inclusion_proof(index, size, SMALL_LOG.read) == path(index, leaves)
    assert consistency_proof(index + 1, size, SMALL_LOG.read) == subproof(index + 1, leaves)


@pytest.mark.parametrize("size", range(1, 70))
def test_all_proofs_of_small_logs_are_those_of_the_rfc(size: int) -> None:
    leaves = LEAVES[:size]
    for index in range(size):
        assert inclusion_proof(index, size, SMALL_LOG.read) == path(index, leaves)
        assert consistency_proof(index + 1, size, SMALL_LOG.read) == subproof(index + 1, leaves)


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 65_792, 66_000])
def test_proofs_around_a_third_level(size: int) -> None:
    root = tree_root(size, LARGE_LOG.read)
    assert root == root_of(LARGE[:size])
    for index in (0, 255, 256, 32_767, 32_768, 65_279, 65_280, 65_534, size - 1):
        proof = inclusion_proof(index, size, LARGE_LOG.read)
        verify_inclusion(leaf=LARGE[index], index=index, size=size, proof=proof, root=root)
        first = index + 1
        verify_consistency(
            first=first,
            second=size,
            proof=consistency_proof(first, size, LARGE_LOG.read),
            first_root=root_of(LARGE[:first]),
            second_root=root,
        )


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 1_000_000), st.data())
@example(1, None)
@example(256, None)
@example(257, None)
@example(65_536, None)
@example(65_537, None)
@example(1_000_000, None)
def test_proof_reads_each_tile_once_and_few_of_them(size: int, data: st.DataObject | None) -> None:
    """At most 2 * ceil(log256 n), counted with made-up tiles: the number of reads does not depend on their content."""
    reads: Counter[tuple[int, int]] = Counter()

    def read(level: int, index: int, width: int) -> bytes:
        reads[level, index] += 1
        assert width == tile_width(level, index, size) > 0
        return bytes(32 * width)

    bound = 2 * ceil(round(log(size, 256), 9))
    for index in (data.draw(st.integers(0, size - 1)), size - 1) if data else (0, size // 2, size - 1):
        for make in (
            lambda: inclusion_proof(index, size, read),  # noqa: B023 - called at once
            lambda: consistency_proof(index + 1, size, read),  # noqa: B023
        ):
            reads.clear()
            make()
            assert set(reads.values()) <= {1}
            assert len(reads) <= bound
        reads.clear()
        tree_root(size, read)
        assert len(reads) <= max(1, bound)


def test_appending_reads_one_tile_a_level() -> None:
    log = log_of(LEAVES[:255])
    log.append(LEAVES[255:300])
    assert log.reads == {(0, 0): 1}
    log.reads.clear()
    assert set(log.append(LEAVES[300:600])) == {(0, 1), (0, 2), (1, 0)}
    assert log.reads == {(0, 1): 1, (1, 0): 1}


def test_short_tile_is_error_and_longer_is_accepted() -> None:
    for content in (b"", bytes(31), bytes(32 * 9)):
        with pytest.raises(ProofError) as caught:
            inclusion_proof(3, 10, lambda *_, content=content: content)
        assert caught.value.check == "tile"
    # A later version of a tile begins with the earlier one.
    assert inclusion_proof(3, 10, SMALL_LOG.read) == path(3, LEAVES[:10])
    assert SMALL_LOG.tiles[0, 0] != b"".join(LEAVES[:10])


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 5), (5, 5), (6, 5)])
def test_proof_refused_for_missing_leaf(index: int, size: int) -> None:
    with pytest.raises(ProofError) as caught:
        inclusion_proof(index, size, SMALL_LOG.read)
    assert caught.value.check == "index"


@pytest.mark.parametrize(("first", "second"), [(0, 5), (6, 5), (-1, 5), (0, 0)])
def test_consistency_refused_from_empty_or_larger_tree(first: int, second: int) -> None:
    with pytest.raises(ProofError) as caught:
        consistency_proof(first, second, SMALL_LOG.read)
    assert caught.value.check == "size"


@pytest.mark.parametrize(
    ("tile", "path_"),
    [
        ((0, 0, 256), "tile/0/000"),
        ((1, 67, 8), "tile/1/067.p/8"),
        ((0, 1_234_067, 8), "tile/0/x001/x234/067.p/8"),
        (("entries", 1_234_067, 256), "tile/entries/x001/x234/067"),
        ((63, 999, 255), "tile/63/999.p/255"),
        ((2, 1000, 1), "tile/2/x001/000.p/1"),
    ],
)
def test_paths_of_the_specification(tile: tuple[int, int, int], path_: str) -> None:
    assert tile_path(*tile) == path_
    assert parse_tile_path(path_) == tile


@given(st.integers(0, 63) | st.just("entries"), st.integers(0, 2**64 - 1), st.integers(1, 256))
def test_paths_are_read_back(level: int, index: int, width: int) -> None:
    assert parse_tile_path(tile_path(level, index, width)) == (level, index, width)


@pytest.mark.parametrize(
    "path_",
    [
        "", "tile", "tile/0", "tile/0/", "tile/0/0", "tile/0/0000", "tile/0/x000/000", "tile/0/x000/001",
        "tile/0/001/002", "tile/0/x001/x234",
        "tile/00/000", "tile/64/000", "tile/-1/000", "tile/0/000.p/0", "tile/0/000.p/256", "tile/0/000.p/08",
        "tile/0/000.p/", "tile/0/000\n", "/tile/0/000", "tile/0/../000", "tile/entry/000", "tile/0/\u0660\u0660\u0660",
        "tile/0/" + "x999/" * 9 + "999",
    ],
)  # fmt: skip
def test_any_other_path_is_refused(path_: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_tile_path(path_)


def test_path_refused_for_malformed_tile() -> None:
    for tile in ((0, 0, 0), (0, 0, 257), (64, 0, 1), (-1, 0, 1), (0, -1, 1)):
        with pytest.raises(InvalidInputError):
            tile_path(*tile)


def test_root_of_a_full_tile_is_the_hash_above_it() -> None:
    tile = b"".join(LEAVES[:256])
    assert tile_root(tile) == root_of(LEAVES[:256]) == SMALL_LOG.tiles[1, 0][:32]
    assert leaf_digest(tile) != tile_root(tile)
