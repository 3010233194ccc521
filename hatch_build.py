"""Compiles the native kernels when the package is installed; also `python hatch_build.py` to build them in place.

Without a C++ compiler the installation goes on: the torch kernels then do the work.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "shards" / "kernels" / "native"
LIBRARY = ROOT / "shards" / "kernels" / "_native.so"
# -ffp-contract=off: product and sum are fused only where the source says so, or rows would lose their equal bits.
# No errno, no traps: lets the compiler vectorise comparisons and roots; values stay the same.
VALUES = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", *VALUES, "-Wno-psabi"]


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: $CXX, else the first of g++ and clang++ on the path; None without one."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked and shutil.which(asked[0]):
        return asked
    return next(([name] for name in ("g++", "clang++") if shutil.which(name)), None)


def build(library: Path = LIBRARY) -> str | None:
    """Compile all of shards/kernels/native into the library; returns None, or why there is no library now."""
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler found (looked for $CXX, g++, clang++)"
    # Beside the old file, then renamed over it: a process that has the old one open keeps it.
    fresh = library.with_name(f".{library.name}.{os.getpid()}")
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    done = subprocess.run([*compiler, *FLAGS, *sources, "-o", str(fresh)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fresh.unlink(missing_ok=True)
        return f"{' '.join(compiler)} failed:\n{done.stderr}"
    fresh.replace(library)
    return None


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
