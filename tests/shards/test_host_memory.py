from pathlib import Path

from shards.host_memory import MemoryFiles, available_memory


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


def test_machine_that_tells_nothing_has_no_number(tmp_path: Path) -> None:
    assert available_memory(MemoryFiles(meminfo=tmp_path / "none")) is None
