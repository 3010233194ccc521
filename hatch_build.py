"""Compiles the native kernels when the package is installed; also `python hatch_build.py` to build them in place.

A library that was made of the same sources by the same compiler is left as it is.

Without a C++ compiler the installation goes on: the torch kernels then do the work.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "shards" / "kernels" / "native"
LIBRARY = ROOT / "shards" / "kernels" / "_native.so"
# -ffp-contract=off: product and sum are fused only where the source says so, or rows would lose their equal bits.
# No errno, no traps: lets the compiler vectorise comparisons and roots; values stay the same.
VALUES = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-O3", "-std=c++17", "-pthread", "-fPIC", *VALUES, "-Wno-psabi"]
MOST_AT_ONCE = 8
"""Compilers, of up to 450 MB each."""


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: $CXX, else the first of g++ and clang++ on the path; None without one."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked and shutil.which(asked[0]):
        return asked
    return next(([name] for name in ("g++", "clang++") if shutil.which(name)), None)


def build(library: Path = LIBRARY) -> str | None:
    """Compile shards/kernels/native into the library, unless it is of them; returns why it cannot be, or None."""
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler found (looked for $CXX, g++, clang++)"
    made_of = _digest(compiler)
    if library.exists() and made_of.encode() in library.read_bytes():
        # `make` goes by times.
        library.touch()
        return None
    # Beside the old file, then renamed over it: a process that has the old one open keeps it.
    fresh = library.with_name(f".{library.name}.{os.getpid()}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_AT_ONCE)) as pool:
        compile_one = [*compiler, *FLAGS, f'-DKERNELS_MADE_OF="{made_of}"', "-c"]
        objects = {path: f"{folder}/{path.stem}.o" for path in sorted(SOURCES.glob("*.cpp"))}
        problems = list(pool.map(_run, ([*compile_one, str(path), "-o", made] for path, made in objects.items())))
        if not any(problems):
            problems = [_run([*compiler, *FLAGS, "-shared", *objects.values(), "-o", str(fresh)])]
    if any(problems):
        fresh.unlink(missing_ok=True)
        return f"{' '.join(compiler)} failed:\n{''.join(problems)}"
    fresh.replace(library)
    return None


def _digest(compiler: list[str]) -> str:
    """Of all that decides on the library's content; path.cpp puts it in there."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    told = hashlib.sha256(repr((compiler, version, platform.machine(), FLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        told.update(f"{path.name}\n".encode() + path.read_bytes())
    return told.hexdigest()


def _run(command: list[str]) -> str:
    """What a failed command says; "" when it succeeds."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stderr or f"status {done.returncode}") if done.returncode else ""


def _warn(problem: str) -> None:
    print(f"warning: native kernels not built: {problem}", file=sys.stderr)
    print("warning: the slower torch kernels will run, without the deterministic mode", file=sys.stderr)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, outside a build
    pass
else:

    class NativeKernelsHook(BuildHookInterface):
        """Builds the library into the tree and ships it in the wheel."""

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            """Called by hatchling before a wheel ("standard" or "editable") is put together."""
            if self.target_name != "wheel":
                return
            problem = build()
            if problem is not None:
                # A library of older sources must not be shipped or loaded.
                LIBRARY.unlink(missing_ok=True)
                _warn(problem)
                return
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


if __name__ == "__main__":
    failure = build()
    if failure is not None:
        _warn(failure)
        sys.exit(1)
    print(f"built {LIBRARY.relative_to(ROOT)}")
