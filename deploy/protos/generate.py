"""Writes the Python files of the public gRPC API; run from anywhere: `python -m deploy.protos.generate`."""

import sys
import sysconfig
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

_SOURCE = "deploy/protos/moefleet_v1.proto"


def generate(out: Path) -> list[Path]:
    """Generate messages, stubs and their types under `out` (a folder that stands for the repository root).

    Raises:
        RuntimeError: the compiler failed; its message is on stderr.
    """
    root = Path(__file__).resolve().parents[2]
    scripts = Path(sysconfig.get_path("scripts"))
    arguments = [
        "protoc",
        f"--proto_path={root}",
        f"--proto_path={resources.files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out={out}",
        f"--mypy_grpc_out={out}",
        _SOURCE,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc failed on {_SOURCE}")
    stem = (out / _SOURCE).with_suffix("")
    return [stem.with_name(stem.name + end) for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")]


if __name__ == "__main__":
    for file in generate(Path(__file__).resolve().parents[2]):
        sys.stdout.write(f"{file}\n")
