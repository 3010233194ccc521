"""Rows of any size and alignment arrive as they are, and nothing beside them is touched."""

import numpy as np
import pytest

from shards.row_copy import RowCopier


@pytest.mark.parametrize("used_next", [False, True])
@pytest.mark.parametrize("num_bytes", [1, 63, 64, 65, 1000, 4096, 8192 + 7, 200_000])
def test_rows_are_copied_byte_for_byte_and_what_lies_beside_them_stays(num_bytes: int, used_next: bool) -> None:
    rng = np.random.default_rng(num_bytes)
    rows = -(-300_000 // num_bytes)
    room = num_bytes + 13
    source = rng.integers(0, 256, rows * room, dtype=np.uint8)
    target = rng.integers(0, 256, rows * room, dtype=np.uint8)
    at = rng.permutation(rows) * room + rng.integers(0, 13, rows)
    to = rng.permutation(rows) * room + rng.integers(0, 13, rows)
    wanted = target.copy()
    for there, here in zip(to, at, strict=True):
        wanted[there : there + num_bytes] = source[here : here + num_bytes]
    RowCopier().copy(target, to, source, at, num_bytes, used_next=used_next)
    assert np.array_equal(target, wanted)


def test_the_copy_without_a_compiled_library_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.row_copy.load_library", lambda: None)
    target = np.zeros(64, np.uint8)
    RowCopier().copy(target, np.array([40, 0]), np.arange(64, dtype=np.uint8), np.array([3, 20]), 5)
    assert target[40:45].tolist() == [3, 4, 5, 6, 7]
    assert target[:5].tolist() == [20, 21, 22, 23, 24]
