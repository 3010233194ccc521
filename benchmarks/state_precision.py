"""What rounded recurrent states cost and give: `python -m benchmarks.state_precision MODEL [--texts N] [--tokens T]`.

The error of the next-token distribution behind every position of known texts against float32 states: with states in
bfloat16, and behind a hit in the middle of the text whose state was kept in int8. Then how much of ten-turn chats is
found under one memory budget, and the speed of decoding. Texts are conversations as the demo models were trained on,
one after the other; with --random, random tokens.
"""

import argparse
import random
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from cluster.config import EngineConfig
from deploy.bench_engine import BenchEngine
from deploy.tokenizer import load_tokenizer
from router.request import Request, RequestId, SamplingParams
from shards.batch import LogprobColumns, RowSampling, RowStart, StepBatch
from shards.comm import Comms
from shards.families import load_model_config
from shards.mesh import Layout, Place
from shards.rank import Rank, RankConfig
from tests.support.live_engine import live_engine
from training.data import examples
from training.encoding import encode

BLOCK = 16
MOST_TOP = 1024


def make_texts(args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Token ids, each text `args.tokens` long."""
    if args.random:
        rng, vocab = random.Random(1), load_model_config(args.model).vocab_size
        return [tuple(rng.choices(range(vocab), k=args.tokens)) for _ in range(args.texts)]
    tokenizer = load_tokenizer(args.model)
    stream = chain.from_iterable(chain(*encode(tokenizer, example)) for example in examples("states", held_out=True))
    return [tuple(islice(stream, args.tokens)) for _ in range(args.texts)]


def make_rank(args: argparse.Namespace, state_dtype: str, num_int8: int) -> Rank:
    """A loaded rank with room for two rows that share blocks."""
    config = RankConfig(
        model=args.model,
        place=Place(layout=Layout(), rank=0),
        dtype=args.dtype,
        state_dtype="bfloat16" if state_dtype == "bfloat16" else "float32",
        block_size=BLOCK,
        num_blocks=-(-args.tokens // BLOCK),
        num_slots=2,
        num_int8=num_int8,
        max_rows=2,
        max_model_len=args.tokens,
        threads=args.threads,
    )
    rank = Rank(config, Comms.local())
    rank.load()
    return rank


def distributions(columns: Iterable[LogprobColumns], vocab: int) -> Tensor:
    """Log probabilities [positions, V] of the best tokens; NaN for the rest."""
    rows = [pair for part in columns for pair in zip(part.top_ids_NK, part.top_logprobs_NK, strict=True)]
    table = torch.full((len(rows), vocab), torch.nan, dtype=torch.float64)
    ids, values = torch.tensor([ids for ids, _ in rows]), torch.tensor([row for _, row in rows], dtype=torch.float64)
    return table.scatter_(1, ids, values)


def read(rank: Rank, text: tuple[int, ...], *, hit: int = 0) -> Tensor:
    """The distributions behind the text's positions from `hit` on, in one step behind that many found by a hit."""
    vocab = rank.model_config.vocab_size
    blocks = tuple(range(-(-len(text) // BLOCK)))
    asked = RowSampling(prompt_logprobs=min(vocab, MOST_TOP))
    starts = [
        RowStart(row=row, token_ids=text, prompt_len=len(text), blocks=blocks, state_slot=row, sampling=sampling)
        for row, sampling in enumerate([RowSampling(), asked])
    ]
    restores: tuple[list[int], list[int]] = ([], [])
    if hit:
        keeps = StepBatch(starts=(starts[0],), rows_S=[0], first_S=[0], counts_S=[hit], samples_S=[0])
        rank.step(replace(keeps, save_rows=[0], save_ends=[hit], save_to=[0]))
        restores = ([0], [1])
    batch = StepBatch(starts=(starts[1],), rows_S=[1], first_S=[hit], counts_S=[len(text) - hit], samples_S=[0])
    output = rank.step(replace(batch, restore_from=restores[0], restore_to=restores[1]))
    assert output is not None
    return distributions(output.prompt_logprobs.values(), vocab)


def compare(found: Tensor, expected: Tensor) -> str:
    """Relative error of the centred log probabilities, mean divergence and agreement of the best token."""
    known = ~(found.isnan() | expected.isnan())
    count = known.sum(-1, keepdim=True)
    a, b = found.masked_fill(~known, 0), expected.masked_fill(~known, 0)
    centred = [(x - x.sum(-1, keepdim=True) / count).masked_fill(~known, 0) for x in (a, b)]
    error = (centred[0] - centred[1]).norm(dim=-1) / centred[1].norm(dim=-1)
    divergence = ((b.exp() * (b - a)).masked_fill(~known, 0)).sum(-1)
    same = found.nan_to_num(-1e9).argmax(-1) == expected.nan_to_num(-1e9).argmax(-1)
    return (
        f"logits off by {error.median().item():.2%} (median), {error.max().item():.2%} (most); divergence "
        f"{divergence.mean().item():.1e}; best token the same in {same.double().mean().item():.2%} of {len(same)}"
    )


def measure_error(args: argparse.Namespace) -> None:
    """Print a line for each way to hold states."""
    texts, hit = make_texts(args), args.tokens // 2 // BLOCK * BLOCK
    plain = make_rank(args, "float32", 0)
    expected = [read(plain, text) for text in texts]
    plain.close()
    narrow = make_rank(args, "bfloat16", 0)
    found = [read(narrow, text) for text in texts]
    print("bfloat16 states    ", compare(torch.cat(found), torch.cat(expected)), flush=True)
    narrow.close()
    coded = make_rank(args, "float32", 1)
    shape = coded.cache.shape
    print(f"bytes of a state: {shape.bytes_per_slot} float32, {shape.bytes_per_int8} int8", flush=True)
    found.clear()
    errors: list[float] = []
    for text in texts:
        found.append(read(coded, text, hit=hit))
        for layer in coded.cache.states:
            kept = layer.int8
            assert kept is not None
            layer.restore(torch.tensor([0]), torch.tensor([1]))
            exact, back = layer.delta_MVDD[0], layer.delta_MVDD[1]
            errors.append(((back - exact).norm() / exact.norm()).item())
    coded.close()
    print(f"int8 state: relative error {statistics.mean(errors):.2%} (mean of layers and texts)")
    behind = [x[hit:] for x in expected]
    for most in (BLOCK, args.tokens):
        pair = (torch.cat([x[:most] for x in side]) for side in (found, behind))
        print(f"int8 hit, next {min(most, len(behind[0])):5d}", compare(*pair), flush=True)


def chats(config: EngineConfig, count: int, turns: int) -> tuple[int, int]:
    """Prompt tokens found and asked for, of `count` chats that take turns; each turn brings 24 tokens and gets 8."""
    rng, vocab = random.Random(3), load_model_config(config.model).vocab_size
    said: list[list[int]] = [[] for _ in range(count)]
    found = asked = 0
    with live_engine(config) as engine:
        for turn in range(turns):
            for index, words in enumerate(said):
                words += rng.choices(range(5, vocab), k=24)
                sampling = SamplingParams(max_tokens=8, temperature=0.0)
                (events,) = engine.serve(
                    Request(id=RequestId(f"{turn}-{index}"), prompt_ids=tuple(words), sampling=sampling)
                )
                found, asked = found + events[0].cached_tokens, asked + len(words)
                words += [event.token_id for event in events if event.token_id is not None]
    return found, asked


def measure_hits(args: argparse.Namespace) -> None:
    """Print what is found of chats under one budget."""
    for kind in ("exact", "int8"):
        config = EngineConfig(
            model=args.model,
            dtype=args.dtype,
            kv_memory_bytes=args.kv_memory,
            state_cache_share=args.share,
            max_rows=16,
            max_step_tokens=512,
            max_model_len=512,
            threads=args.threads,
            state_checkpoints="int8" if kind == "int8" else "exact",
        )
        found, asked = chats(config, args.chats, 10)
        print(f"{kind:6s} checkpoints: {found} of {asked} prompt tokens found ({found / asked:.0%})", flush=True)


def measure_speed(args: argparse.Namespace) -> None:
    """Print tokens a second of decoding in turns, states in float32 and in bfloat16."""
    rng, vocab = random.Random(5), load_model_config(args.model).vocab_size
    engines = [
        BenchEngine(
            EngineConfig(
                model=args.model,
                dtype=args.dtype,
                state_dtype="bfloat16" if name == "bfloat16" else "float32",
                max_rows=max(args.rows),
                prefix_cache=False,
                threads=args.threads,
            )
        )
        for name in ("float32", "bfloat16")
    ]
    for rows in args.rows:
        prompts = [rng.choices(range(vocab), k=32) for _ in range(rows)]
        rates = [list(_rates(engine, prompts, args)) for engine in engines]
        wide, narrow = (statistics.median(values) for values in rates)
        print(f"{rows} rows: float32 {wide:.1f} tokens/s, bfloat16 {narrow:.1f} ({narrow / wide:.2f}x)", flush=True)
    for engine in engines:
        engine.close()


def _rates(engine: BenchEngine, prompts: list[list[int]], args: argparse.Namespace) -> Iterator[float]:
    for round_ in range(args.rounds + 1):
        done = engine.generate(prompts, args.new)
        if round_:
            yield len(prompts) * (args.new - 1) / (done.wall_s - max(done.ttft_s))


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", nargs="+", default=["error", "hits", "speed"], choices=["error", "hits", "speed"])
    parser.add_argument("--random", action="store_true", help="texts of random tokens")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chats", type=int, default=40)
    parser.add_argument("--kv-memory", type=int, default=16 << 20, help="bytes, for the chats")
    parser.add_argument("--share", type=float, default=0.1, help="of it, for kept states")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    parts = {"error": measure_error, "hits": measure_hits, "speed": measure_speed}
    for name in args.parts:
        parts[name](args)


if __name__ == "__main__":
    main()
