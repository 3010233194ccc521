"""`moefleet bench worker`: an engine driven by JSON lines, for programs that compare engines.

Each line in is one JSON object, each answer one line that begins with "@@":

    {"op": "load", "model": DIR, "dtype": "bf16", "max_len": N, "max_seqs": N}  -> {"ok": true}
    {"op": "generate", "prompts": [[ids], ..], "max_new": N}  -> {"tokens": [[ids], ..], "wall": s, "ttft": [s, ..]}
    {"op": "quit"}

Generation is greedy and goes on past the model's end tokens; nothing is cached from one call to the next. What
cannot work is answered with {"error": TEXT}.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO, TypeVar, assert_never

from cluster.config import Dtype
from deploy.bench_engine import DTYPES, BenchEngine, BenchOptions
from router.errors import ConfigError, MoefleetError

_SHOWN: Final = 80
"""Characters of a wrong line that its answer repeats."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    model: Path
    dtype: Dtype
    max_len: int
    max_seqs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generate:
    prompts: list[list[int]]
    max_new: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quit:
    pass


_Order = _Load | _Generate | _Quit


def run_worker(options: BenchOptions, lines: Iterable[str], answers: TextIO) -> None:
    """Carry out orders until one is quit, or the lines end."""
    worker = _Worker(options)
    try:
        for line in lines:
            if not line.strip():
                continue
            try:
                order = _parse(line)
                if isinstance(order, _Quit):
                    return
                answer = worker.carry_out(order)
            except MoefleetError as error:
                answer = {"error": str(error)}
            answers.write(f"@@{json.dumps(answer)}\n")
            answers.flush()
    finally:
        worker.close()


class _Worker:
    """The engine of the latest load."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._engine: BenchEngine | None = None

    def carry_out(self, order: _Load | _Generate) -> dict[str, object]:
        match order:
            case _Load():
                self.close()
                self._engine = BenchEngine(
                    self._options.engine_config(
                        order.model, dtype=order.dtype, max_len=order.max_len, max_seqs=order.max_seqs
                    )
                )
                return {"ok": True}
            case _Generate():
                if self._engine is None:
                    raise ConfigError("op generate before op load; load a model first")
                done = self._engine.generate(order.prompts, order.max_new)
                return {"tokens": done.tokens, "wall": done.wall_s, "ttft": done.ttft_s}
            case _:
                assert_never(order)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _parse(line: str) -> _Order:
    try:
        order = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"a line is no JSON: {error}: {line.strip():.{_SHOWN}}") from error
    if not isinstance(order, dict):
        raise ConfigError(f"a line is no JSON object: {line.strip():.{_SHOWN}}")
    match order.get("op"):
        case "load":
            return _parse_load(order)
        case "generate":
            return _Generate(prompts=_prompts(order), max_new=_positive(order, "max_new"))
        case "quit":
            return _Quit()
        case op:
            raise ConfigError(f"op must be load, generate or quit, got {op!r}")


def _parse_load(order: dict[str, object]) -> _Load:
    dtype = _field(order, "dtype", str)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return _Load(
        model=Path(_field(order, "model", str)),
        dtype=DTYPES[dtype],
        max_len=_positive(order, "max_len"),
        max_seqs=_positive(order, "max_seqs"),
    )


def _prompts(order: dict[str, object]) -> list[list[int]]:
    prompts = _field(order, "prompts", list)
    if not prompts or not all(isinstance(each, list) and all(type(i) is int for i in each) for each in prompts):
        raise ConfigError("prompts must be a list of lists of token ids")
    return prompts


def _positive(order: dict[str, object], name: str) -> int:
    value = _field(order, name, int)
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")
    return value


def _field(order: dict[str, object], name: str, kind: type[T]) -> T:
    value = order.get(name)
    if type(value) is not kind:
        raise ConfigError(f"op {order['op']} needs {name}, of type {kind.__name__}, got {value!r:.{_SHOWN}}")
    return value
