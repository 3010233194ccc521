"""Throughput by length of context, Qwen3-Next against full attention: `python -m benchmarks.long_context`.

Two random models of the same size are served by the same engine, one request at a time: a Qwen3-MoE whose four layers
all attend to everything, and a Qwen3-Next with one such layer and three gated delta layers. Each context is a prompt of
that length, really prefilled; prefill throughput is its tokens over the time to the first token, decode throughput that
of the tokens behind it. Writes the curve as JSON and, with the `plots` extra, as a picture.

The models are narrow (hidden size 256) with heads of the real size, so that what grows with the context, reading KV and
scoring it, outweighs the constant rest from some ten thousand tokens on, as it does for the real models in a large
batch; the ratio then tends to that of the layers with KV, which is 4. Alone in its batch, a real model reads its active
weights for one token only, and the ratio is lower.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from cluster.config import EngineConfig
from deploy.bench_engine import BenchEngine
from deploy.checkpoint import write_random_checkpoint
from deploy.checkpoint_tensors import checkpoint_tensors
from deploy.process_use import peak_rss_mb
from shards.config import ModelConfig
from shards.config_fields import Json

NEW_TOKENS = 129
"""The first comes with the prefill; the others are decoded."""

_SHAPE: dict[str, Json] = {
    "head_dim": 128,
    "hidden_size": 256,
    "max_position_embeddings": 1 << 18,
    "moe_intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
# One routed expert less and one of the four a token takes is the shared one: the same parameters, all and active. The
# delta layers' heads make their projections as large as those of the attention that they replace.
MODELS: dict[str, dict[str, Json]] = {
    "qwen3_moe": {"num_experts": 32, "num_experts_per_tok": 4},
    "qwen3_next": {
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 112,
        "num_experts": 31,
        "num_experts_per_tok": 3,
        "num_nextn_predict_layers": 0,
        "shared_expert_intermediate_size": 128,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model at one context length."""

    model: str
    context: int
    """Tokens of the prompt."""
    prefill_s: float
    """Until the first token."""
    prefill_tokens_per_s: float
    decode_ms: float
    """Of one token, the median behind the first."""
    decode_tokens_per_s: float
    peak_rss_mb: float
    """Of the processes that serve the model, up to now."""


def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that one token is multiplied with."""
    total = sum(spec.numel for spec in checkpoint_tensors(model, "fused"))
    expert = 3 * model.moe_intermediate_size * model.hidden_size
    idle = (model.num_experts - model.num_experts_per_tok) * expert * model.num_hidden_layers
    return total, total - idle - model.vocab_size * model.hidden_size


def measure(name: str, engine: BenchEngine, context: int, times: int) -> Point:
    """Serve a prompt of `context` tokens some times; the median prefill, and the median of all decoded tokens."""
    vocab = int(str(_SHAPE["vocab_size"]))
    prompt = torch.randint(0, vocab, (context,), generator=torch.Generator().manual_seed(context)).tolist()
    served = [engine.generate([prompt], NEW_TOKENS) for _ in range(times)]
    prefill_s = statistics.median(done.ttft_s[0] for done in served)
    decode_s = statistics.median(end - begin for done in served for begin, end in pairwise(done.arrivals_s))
    return Point(
        model=name,
        context=context,
        prefill_s=round(prefill_s, 4),
        prefill_tokens_per_s=round(context / prefill_s, 1),
        decode_ms=round(1000 * decode_s, 4),
        decode_tokens_per_s=round(1 / decode_s, 1),
        peak_rss_mb=round(peak_rss_mb(os.getpid())),
    )


def run_model(
    name: str, folder: Path, contexts: Sequence[int], *, threads: int, step_tokens: int, repeat: int
) -> list[Point]:
    """All contexts of one model, the shortest first; short ones five times, others `repeat` times."""
    config = EngineConfig(
        model=folder,
        threads=threads,
        kv_memory_bytes=4 << 30,
        max_rows=1,
        max_step_tokens=step_tokens,
        max_model_len=max(contexts) + NEW_TOKENS,
        prefix_cache=False,
        step_timeout_s=600.0,
    )
    points: list[Point] = []
    with BenchEngine(config) as engine:
        engine.generate([[1] * 256], NEW_TOKENS)
        for context in contexts:
            points.append(measure(name, engine, context, 5 if context <= 8192 else repeat))
            print(points[-1], flush=True)
    return points


def ratios(points: Sequence[Point]) -> list[dict[str, float]]:
    """Throughput of Qwen3-Next over that of full attention, by context both were measured at."""
    by_place = {(point.model, point.context): point for point in points}
    found: list[dict[str, float]] = []
    for context in sorted({point.context for point in points}):
        full, hybrid = by_place.get(("qwen3_moe", context)), by_place.get(("qwen3_next", context))
        if full is not None and hybrid is not None:
            decode, prefill = full.decode_ms / hybrid.decode_ms, full.prefill_s / hybrid.prefill_s
            found.append({"context": context, "decode": round(decode, 2), "prefill": round(prefill, 2)})
    return found


def draw(points: Sequence[Point], file: Path) -> None:
    """Throughput and ratio over context, as a picture."""
    # Drawing needs the `plots` extra; measuring does without.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    decode, prefill, ratio = figure.subplots(1, 3)
    for model in MODELS:
        mine = [point for point in points if point.model == model]
        contexts = [point.context for point in mine]
        decode.plot(contexts, [point.decode_tokens_per_s for point in mine], marker="o", label=model)
        prefill.plot(contexts, [point.prefill_tokens_per_s for point in mine], marker="o", label=model)
    for kind in ("decode", "prefill"):
        rows = ratios(points)
        ratio.plot([row["context"] for row in rows], [row[kind] for row in rows], marker="o", label=kind)
    titles = {"decode, tokens/s": decode, "prefill, tokens/s": prefill, "qwen3_next / qwen3_moe": ratio}
    for title, axes in titles.items():
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context, tokens")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Write both models, measure them, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768, 65536], help="prompt lengths")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step-tokens", type=int, default=2048, help="tokens of a prompt in one step")
    parser.add_argument("--repeat", type=int, default=1, help="of contexts over 8192; the median counts")
    parser.add_argument("--add", type=Path, help="JSON of an earlier run, at other contexts, to go into the same curve")
    parser.add_argument("--out", type=Path, help="name of the JSON and PNG files, without ending")
    arguments = parser.parse_args()
    contexts: list[int] = sorted(arguments.contexts)
    points: list[Point] = []
    sizes: dict[str, dict[str, int]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            path = Path(folder) / name
            total, active = count_parameters(
                write_random_checkpoint(name, "tiny", 0, path, overrides=_SHAPE | MODELS[name], form="fused")
            )
            sizes[name] = {"parameters": total, "active_parameters": active}
            print(name, sizes[name], flush=True)
            limits = {"threads": arguments.threads, "step_tokens": arguments.step_tokens, "repeat": arguments.repeat}
            points += run_model(name, path, contexts, **limits)
    if arguments.add is not None:
        points += [Point(**point) for point in json.loads(arguments.add.read_text())["points"]]
        points.sort(key=lambda point: (point.model, point.context))
    report = {"models": sizes, "ratios": ratios(points), "points": [asdict(point) for point in points]}
    for row in report["ratios"]:
        print(row)
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        draw(points, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
