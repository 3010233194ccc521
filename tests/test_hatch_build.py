"""The compiled library is made anew when what it was made of has changed, and stays as it is otherwise."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


class Tree:
    """A tree of two small sources, and their library."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.native = folder / "shards" / "kernels" / "native"
        self.library = folder / "shards" / "kernels" / "_native.so"
        self.native.mkdir(parents=True)
        shutil.copy(ROOT / "hatch_build.py", folder)
        (self.native / "number.h").write_text("inline int number() { return 7; }\n")
        (self.native / "one.cpp").write_text('#include "number.h"\nextern "C" int one() { return number(); }\n')
        (self.native / "two.cpp").write_text('extern "C" const char* two() { return KERNELS_MADE_OF; }\n')

    def build(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.folder / "hatch_build.py")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def number(self) -> int:
        # Under a name of its own: a library that is open already would be found again.
        copy = shutil.copy(self.library, self.folder / f"{self.library.stat().st_ino}.so")
        return int(ctypes.CDLL(str(copy)).one())


def test_all_sources_are_in_the_library_which_is_made_anew_when_a_header_changes_only(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    assert tree.build().returncode == 0
    assert tree.number() == 7
    before = tree.library.stat()

    assert tree.build().returncode == 0
    same = tree.library.stat()
    assert same.st_ino == before.st_ino
    # `make` compares times.
    assert same.st_mtime_ns > before.st_mtime_ns

    (tree.native / "number.h").write_text("inline int number() { return 8; }\n")
    assert tree.build().returncode == 0
    assert tree.number() == 8


def test_source_that_cannot_be_compiled_is_told_and_the_library_before_it_stays(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    assert tree.build().returncode == 0
    (tree.native / "one.cpp").write_text("int broken(\n")

    failed = tree.build()

    assert failed.returncode == 1
    assert "native kernels not built" in failed.stderr
    assert "one.cpp" in failed.stderr
    assert tree.number() == 7
    assert sorted(path.name for path in tree.library.parent.iterdir()) == ["_native.so", "native"]
