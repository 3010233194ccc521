"""`moefleet bench engine`: times scenarios on an engine of this process, and writes a line for each."""

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from cluster.config import EngineConfig
from cluster.resolve import resolve_engine
from deploy.bench_engine import DTYPES, BenchEngine, BenchOptions, check_room
from deploy.bench_profile import ProfileTable, profile_table
from deploy.bench_scenarios import Scenario
from deploy.bench_startup import time_startup
from deploy.process_use import OthersCpu, peak_rss_mb
from router.errors import ConfigError
from shards.step_profile import StepProfile

_SEED: Final = 7
_WARM_TOKENS: Final = 8
Prompts = list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun:
    """What `moefleet bench engine` was asked."""

    options: BenchOptions
    model: Path
    dtype: str
    """A key of DTYPES."""
    scenarios: tuple[Scenario, ...]
    repeat: int
    json: bool
    """One JSON object a scenario and line; else plain text."""
    profile: bool
    """Also tell where a step's time goes, by a further run; the timing itself slows every run a little."""
    worker_flags: tuple[str, ...]
    """The same options as words, for workers whose start is timed."""

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ConfigError(f"--repeat must be at least 1, got {self.repeat}")
        if self.profile and self.options.device != "cpu":
            raise ConfigError(
                f"--profile times the parts of a step on the host, behind which --device={self.options.device} still "
                "computes; leave --profile out, or use --device=cpu"
            )


def run_bench(run: BenchRun, out: TextIO) -> None:
    """Time every scenario in order; each one's line is written when it is done.

    Figures are medians of `repeat` runs. `decode_tok_s` leaves the prompts out: N sequences' further tokens over the
    time of full runs less that of runs of one new token. `others_cpu` tells how many processors all others used.

    Raises:
        MoefleetError: an option, the checkpoint or a scenario cannot work, or a rank was lost.
    """
    config = run.options.engine_config(
        run.model,
        dtype=DTYPES[run.dtype],
        max_len=max(scenario.num_tokens for scenario in run.scenarios),
        max_seqs=max(scenario.num_prompts for scenario in run.scenarios),
    )
    resolved = resolve_engine(config)
    for scenario in run.scenarios:
        check_room(resolved, [scenario.num_tokens] * scenario.num_prompts)
    vocab_size = resolved.model.vocab_size
    with _Engines(config, StepProfile() if run.profile else None) as engines:
        for scenario in run.scenarios:
            make_prompts = _prompt_maker(scenario, vocab_size)
            with OthersCpu() as others:
                if scenario.kind == "startup":
                    figures = _measure_startup(run, scenario, make_prompts()[0])
                else:
                    figures = _measure(engines.get(), scenario, run.repeat, make_prompts)
                    figures["peak_rss_mb"] = peak_rss_mb(os.getpid())
            profile = None
            if scenario.kind != "startup" and engines.profile is not None:
                profile = _profile(engines.get(), engines.profile, scenario, make_prompts())
            _write(run, scenario, {"others_cpu": others.cpus} | figures, profile, out)


class _Engines:
    """The engine of all scenarios, loaded when the first one needs it."""

    def __init__(self, config: EngineConfig, profile: StepProfile | None) -> None:
        self.profile = profile
        self._config = config
        self._engine: BenchEngine | None = None

    def __enter__(self) -> "_Engines":
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()

    def get(self) -> BenchEngine:
        if self._engine is None:
            self._engine = BenchEngine(self._config, self.profile)
        return self._engine


def _prompt_maker(scenario: Scenario, vocab_size: int) -> Callable[[], Prompts]:
    """Makes other random prompts each time, and the same in each process."""
    rng = random.Random(_SEED)

    def make() -> Prompts:
        return [[rng.randrange(vocab_size) for _ in range(scenario.prompt_tokens)] for _ in range(scenario.num_prompts)]

    return make


def _profile(engine: BenchEngine, profile: StepProfile, scenario: Scenario, prompts: Prompts) -> ProfileTable | None:
    profile.reset()
    done = engine.generate(prompts, scenario.new_tokens)
    if scenario.kind == "prefill":
        return profile_table(profile, done.prefill, "prefill")
    return profile_table(profile, done.decode, "decode")


def _measure(
    engine: BenchEngine, scenario: Scenario, repeat: int, make_prompts: Callable[[], Prompts]
) -> dict[str, object]:
    def walls(max_new: int) -> list[float]:
        return [engine.generate(make_prompts(), max_new).wall_s for _ in range(repeat)]

    engine.generate(make_prompts(), min(_WARM_TOKENS, scenario.new_tokens))
    num_prompts, new = scenario.num_prompts, scenario.new_tokens
    if scenario.kind == "prefill":
        rates = [num_prompts * scenario.prompt_tokens / wall for wall in walls(1)]
        return {"prefill_tok_s": statistics.median(rates), "all": rates}
    first = statistics.median(walls(1))
    whole = walls(new)
    rates = [num_prompts * new / wall for wall in whole]
    decode_s = statistics.median(whole) - first
    return {
        "new_tokens": num_prompts * new,
        "out_tok_s": statistics.median(rates),
        "decode_tok_s": num_prompts * (new - 1) / decode_s if decode_s > 0 else None,
        "wall1_ms": 1e3 * first,
        "all": rates,
    }


def _measure_startup(run: BenchRun, scenario: Scenario, prompt: Sequence[int]) -> dict[str, object]:
    starts = [
        time_startup(
            run.worker_flags, run.model, dtype=run.dtype, max_len=scenario.num_tokens, max_seqs=1, prompt=prompt
        )
        for _ in range(run.repeat)
    ]
    return {
        "startup_s": statistics.median(start.seconds for start in starts),
        "peak_rss_mb": statistics.median(start.peak_rss_mb for start in starts),
        "all": [start.seconds for start in starts],
    }


def _write(
    run: BenchRun, scenario: Scenario, figures: dict[str, object], profile: ProfileTable | None, out: TextIO
) -> None:
    rounded = {name: _round(value) for name, value in figures.items()}
    if run.json:
        line = {
            "ts": time.strftime("%H:%M:%S"),
            "model": run.model.name,
            "peer": "moefleet",
            "dtype": run.dtype,
            "scenario": scenario.name,
            "repeat": run.repeat,
            **rounded,
        }
        if profile is not None:
            line["profile"] = profile.as_json()
        out.write(json.dumps(line) + "\n")
    else:
        out.write(f"{scenario.name:14} {'  '.join(_plain(rounded))}\n")
        out.writelines(f"{line}\n" for line in (profile.lines() if profile is not None else ()))
    out.flush()


def _plain(figures: dict[str, object]) -> Iterator[str]:
    return (f"{name} {value}" for name, value in figures.items() if name != "all")


def _round(value: object) -> object:
    if isinstance(value, list):
        return [_round(each) for each in value]
    return round(value, 2) if isinstance(value, float) else value
