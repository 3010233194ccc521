"""Write the Python code of cluster/protos/member.proto: `python -m cluster.protos.generate`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTO = "cluster/protos/member.proto"


def generate(out: Path) -> list[Path]:
    """Write messages, stubs and services below `out` (the repository root for the committed files).

    Returns:
        The files written.

    Raises:
        ValueError: protoc refused the file; the message is its own.
    """
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}"]
    command += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    done = subprocess.run([*command, PROTO], cwd=ROOT, capture_output=True, text=True, env={"PATH": _tool_path()})
    if done.returncode:
        raise ValueError(f"{PROTO}: {done.stderr.strip()}")
    return sorted((out / PROTO).parent.glob("member_pb2*"))


def _tool_path() -> str:
    # protoc finds its mypy plugins beside the interpreter.
    return f"{Path(sys.executable).parent}:/usr/bin:/bin"


if __name__ == "__main__":
    generate(ROOT)
