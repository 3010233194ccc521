import os
import subprocess
import sys

from deploy.process_use import peak_rss_mb

BIG = "b'x' * (64 << 20); input()"


def test_peak_memory_counts_children_and_what_is_freed_again() -> None:
    before = peak_rss_mb(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", f"print(len(b'x' * (64 << 20)), flush=True); {BIG}"], stdin=-1, stdout=-1
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert peak_rss_mb(os.getpid()) > before + 64
        assert peak_rss_mb(child.pid) > 64
        child.kill()


def test_a_process_that_is_gone_has_no_memory() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert peak_rss_mb(child.pid) == 0
