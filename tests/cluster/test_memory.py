from pathlib import Path

import pytest

from cluster.memory import MemoryFiles, available_memory, check_memory
from router.errors import ConfigError

GIB = 1 << 30


def make_files(folder: Path, *, available_kib: int, limit: str = "max", used: int = 0, cache: int = 0) -> MemoryFiles:
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    (folder / "max").write_text(f"{limit}\n")
    (folder / "current").write_text(f"{used}\n")
    (folder / "stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return MemoryFiles(meminfo=folder / "meminfo", limit=folder / "max", used=folder / "current", stat=folder / "stat")


def test_without_a_container_limit_the_kernels_count_holds(tmp_path: Path) -> None:
    assert available_memory(make_files(tmp_path, available_kib=100)) == 102400


def test_container_limit_caps_it_and_file_cache_counts_as_free(tmp_path: Path) -> None:
    files = make_files(tmp_path, available_kib=1 << 20, limit="1000", used=900, cache=300)
    assert available_memory(files) == 400


def test_machine_that_tells_nothing_is_not_checked(tmp_path: Path) -> None:
    assert available_memory(MemoryFiles(meminfo=tmp_path / "none")) is None
    check_memory(kv_bytes=1 << 60, weight_bytes=0, ranks=1, available=None)


def test_kv_that_does_not_fit_is_refused_with_bytes_option_and_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(kv_bytes=3 * GIB, weight_bytes=2 * GIB, ranks=2, available=4 * GIB)
    message = str(caught.value)
    assert f"kv_memory_bytes={3 * GIB}" in message
    assert "(8.00 GiB)" in message
    assert f"--kv-memory) to at most {GIB} bytes (1.00 GiB)" in message


def test_weights_that_do_not_fit_have_another_remedy() -> None:
    with pytest.raises(ConfigError, match="use a larger machine"):
        check_memory(kv_bytes=1, weight_bytes=2 * GIB, ranks=1, available=GIB)


def test_what_fits_is_let_through() -> None:
    check_memory(kv_bytes=GIB, weight_bytes=GIB, ranks=2, available=3 * GIB)
