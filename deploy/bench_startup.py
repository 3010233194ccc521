"""Times a start from the command to the first token: a worker process is started anew each time."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.process_use import peak_rss_mb
from router.errors import MoefleetError

_QUIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Startup:
    """One start."""

    seconds: float
    peak_rss_mb: float


def time_startup(
    flags: Sequence[str], model: Path, *, dtype: str, max_len: int, max_seqs: int, prompt: Sequence[int]
) -> Startup:
    """Start `moefleet bench worker` with these flags, load a model, make one token, and end it.

    Raises:
        MoefleetError: the worker refused, or died; its account is on standard error.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "bench", "worker", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        try:
            _ask(worker, {"op": "load", "model": str(model), "dtype": dtype, "max_len": max_len, "max_seqs": max_seqs})
            _ask(worker, {"op": "generate", "prompts": [list(prompt)], "max_new": 1})
            found = Startup(seconds=time.perf_counter() - started, peak_rss_mb=peak_rss_mb(worker.pid))
            _tell(worker, {"op": "quit"})
            worker.wait(_QUIT_S)
        finally:
            worker.kill()
    return found


def _tell(worker: "subprocess.Popen[str]", order: dict[str, object]) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps(order) + "\n")
        worker.stdin.flush()
    except BrokenPipeError as error:
        raise MoefleetError(f"the worker ended with status {worker.wait()}") from error


def _ask(worker: "subprocess.Popen[str]", order: dict[str, object]) -> None:
    """Send an order and wait for its answer."""
    _tell(worker, order)
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("@@"):
            answer = json.loads(line[2:])
            if "error" in answer:
                raise MoefleetError(answer["error"])
            return
    raise MoefleetError(f"the worker ended with status {worker.wait()}")
