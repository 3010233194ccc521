"""The Triton kernels, in Triton's interpreter: no GPU is needed, and none of their speed is shown."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is a gigabyte that not every CPU has: make install-dev",
)
def test_the_triton_kernels_agree_with_the_plain_ones_in_the_interpreter() -> None:
    # Triton reads the variable when kernels are defined, so that it takes a process of its own.
    checks = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/support/triton_checks.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(checks, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="as above")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_is_left_to_compile_in_steps_and_kernels_fit_the_gpu(dtype: str) -> None:
    # It puts a driver of its own into Triton.
    command = [sys.executable, "-m", "benchmarks.gpu_compile", "--scale", "tiny", "--dtype", dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("; 0 more in steps") == 2
