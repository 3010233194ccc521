"""Speed-up by drafts: `python -m benchmarks.speculation MODEL [--unseen] [--rows 1 4 16] [--drafts 1 2 3]`.

Ranks for each number of drafts, greedy; each batch is served in turns by all of them, from prompts to last tokens, and
compared round by round: the median ratio, the least and the best; and the quickest rounds, as a busy machine disturbs
those least. The first --warm-up rounds are not counted (a policy that knows nothing saves up for its first try, some
hundred to some thousand steps); what is learnt in it is kept, as a member does while it serves. With --anew each
round begins as a member does right after its start, nothing known of drafts: what learning costs is counted in full,
in generations of --new tokens, where a member pays it once in its life.
With --unseen the prompts are conversations that the demo's models were not trained on, all with thinking; with
--prompts FILE its lines, repeated as need be; else they are random, and drafts are right by chance only.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from cluster.config import DraftPolicyChoice, EngineConfig
from cluster.engine_stats import EngineStats
from deploy.bench_engine import BenchEngine
from deploy.tokenizer import load_tokenizer
from shards.families import load_model_config
from training.data import examples
from training.encoding import encode

PROMPT_TOKENS = 64


def make_prompts(model: Path, file: Path | None, rows: int, *, unseen: bool) -> list[list[int]]:
    """Token ids of `rows` prompts."""
    if unseen:
        asked = islice((example for example in examples("test", held_out=True) if example.thinking), rows)
        return [list(encode(load_tokenizer(model), example)[0]) for example in asked]
    if file is not None:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
        tokenizer = load_tokenizer(model)
        return [list(tokenizer.encode_rendered(lines[row % len(lines)].replace("\\n", "\n"))) for row in range(rows)]
    rng, vocab = random.Random(1), load_model_config(model).vocab_size
    return [[rng.randrange(vocab) for _ in range(PROMPT_TOKENS)] for _ in range(rows)]


def open_engine(args: argparse.Namespace, drafts: int, policy: DraftPolicyChoice) -> BenchEngine:
    """Loaded ranks that draft up to this many tokens."""
    config = EngineConfig(
        model=args.model,
        dtype=args.dtype,
        threads=args.threads,
        max_rows=max(args.rows),
        prefix_cache=False,
        draft_tokens=drafts,
        draft_policy=policy,
    )
    return BenchEngine(config)


def measure(args: argparse.Namespace, engines: Sequence[tuple[str, BenchEngine]], rows: int) -> None:
    """Print one line an engine: tokens a second, the speed over that without drafts, how many drafts were right."""
    prompts = make_prompts(args.model, args.prompts, rows, unseen=args.unseen)
    seconds: dict[str, list[float]] = {name: [] for name, _ in engines}
    stats: dict[str, EngineStats] = {}
    expected: list[list[int]] = []
    for round_ in range(args.warm_up + args.rounds):
        for name, engine in engines:
            if args.anew:
                engine.forget_drafts()
            found = engine.generate(prompts, args.new)
            expected = expected or found.tokens
            assert found.tokens == expected, f"{name} gives other tokens"
            if round_ >= args.warm_up:
                seconds[name].append(found.wall_s)
            stats[name] = engine.stats
    plain = seconds[engines[0][0]]
    for name, _ in engines:
        rate, drafted = rows * args.new / statistics.median(seconds[name]), stats[name].drafted_tokens
        ratios = sorted(without / with_ for without, with_ in zip(plain, seconds[name], strict=True))
        right = stats[name].accepted_tokens / drafted if drafted else 0.0
        print(
            f"{rows:4d} rows  {name:12s} {rate:8.1f} tokens/s  {statistics.median(ratios):6.3f}x "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})  quickest {min(plain) / min(seconds[name]):6.3f}x  "
            f"{drafted / (rows * args.new):5.2f} drafts a token, {right:4.0%} right",
            flush=True,
        )


def main() -> None:
    """Measure every batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, help="a text a line, \\n for line ends")
    parser.add_argument("--unseen", action="store_true", help="conversations that the demo's models have not seen")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--always", action="store_true", help="also engines that draft whether it pays or not")
    parser.add_argument("--anew", action="store_true", help="forget what was learnt before each round")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    wanted: list[tuple[str, int, DraftPolicyChoice]] = [("none", 0, "adaptive")]
    for drafts in args.drafts:
        wanted.append((f"up to {drafts}", drafts, "adaptive"))
        if args.always:
            wanted.append((f"always {drafts}", drafts, "always"))
    with ExitStack() as stack:
        engines = [(name, stack.enter_context(open_engine(args, drafts, policy))) for name, drafts, policy in wanted]
        for rows in args.rows:
            measure(args, engines, rows)


if __name__ == "__main__":
    main()
