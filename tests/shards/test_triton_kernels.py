"""The Triton kernels, in Triton's interpreter: no GPU is needed, and none of their speed is shown."""

import importlib.util
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.side_by_side
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is a gigabyte that not every CPU has: make install-dev",
)
def test_the_triton_kernels_agree_with_the_plain_ones_in_the_interpreter() -> None:
    # Triton reads the variable when kernels are defined, so that it takes a process of its own.
    checks = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "2"]
    done = subprocess.run(
        [*checks, "tests/support/triton_checks.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.side_by_side
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="as above")
def test_nothing_is_left_to_compile_in_steps_and_kernels_fit_the_gpu() -> None:
    # It puts a driver of its own into Triton.
    command = [sys.executable, "-m", "benchmarks.gpu_compile", "--scale", "tiny", "--dtype"]
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, dtype], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
            for dtype in ("bfloat16", "float32")
        ]
        told = [process.communicate()[0] for process in running]
    for process, text in zip(running, told, strict=True):
        assert process.returncode == 0, text
        assert text.count("; 0 more in steps") == 2
