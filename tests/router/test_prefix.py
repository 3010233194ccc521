"""Block hashes agree over processes and never over different prefixes, salts or block sizes."""

import os
import subprocess
import sys

from router.prefix import block_hashes, extend_hashes


def test_only_full_blocks_are_hashed() -> None:
    assert len(block_hashes(range(11), 4)) == 2
    assert block_hashes(range(3), 4) == []


def test_equal_prefixes_have_equal_hashes_and_a_changed_token_changes_all_behind_it() -> None:
    one = block_hashes(range(16), 4)
    other = block_hashes([0, 1, 2, 3, 4, 99, *range(6, 16)], 4)
    assert one[0] == other[0]
    assert not set(one[1:]) & set(other[1:])


def test_equal_blocks_at_different_places_differ() -> None:
    hashes = block_hashes([5, 5, 5, 5, 5, 5], 2)
    assert len(set(hashes)) == 3


def test_salts_and_block_sizes_never_agree() -> None:
    plain = block_hashes(range(16), 4)
    assert not set(plain) & set(block_hashes(range(16), 4, "tenant"))
    assert not set(plain) & set(block_hashes(range(16), 8))


def test_extending_gives_what_hashing_at_once_gives() -> None:
    hashes = block_hashes(range(9), 4, "s")
    extend_hashes(hashes, range(21), 4, "s")
    assert hashes == block_hashes(range(21), 4, "s")


def test_hashes_are_64_bits_and_equal_in_another_process() -> None:
    code = "from router.prefix import block_hashes; print(block_hashes(range(40), 16, 'x'))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    hashes = block_hashes(range(40), 16, "x")
    assert done.stdout.strip() == str(hashes)
    assert all(0 <= value < 2**64 for value in hashes)
