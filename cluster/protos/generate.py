"""Write the Python code of cluster/protos/member.proto: `python -m cluster.protos.generate`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTO = "cluster/protos/member.proto"


def compile_proto(proto: str, out: Path) -> list[Path]:
    """Write messages, stubs and services of a file below `out` (the repository root for the committed files).

    Args:
        proto: its path in the repository.

    Returns:
        The files written.

    Raises:
        ValueError: protoc refused the file; the message is its own.
    """
    # In a process of its own: the compiler brings a C++ library that others, NIXL's among them, abort beside.
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}"]
    has_service = "\nservice " in (ROOT / proto).read_text()
    kinds = ("python", "mypy", "grpc_python", "mypy_grpc") if has_service else ("python", "mypy")
    command += [f"--{kind}_out={out}" for kind in kinds]
    done = subprocess.run([*command, proto], cwd=ROOT, capture_output=True, text=True, env={"PATH": _tool_path()})
    if done.returncode:
        raise ValueError(f"{proto}: {done.stderr.strip()}")
    source = Path(proto)
    return sorted((out / source.parent).glob(f"{source.stem}_pb2*"))


def _tool_path() -> str:
    # protoc finds its mypy plugins beside the interpreter.
    return f"{Path(sys.executable).parent}:/usr/bin:/bin"


if __name__ == "__main__":
    compile_proto(PROTO, ROOT)
