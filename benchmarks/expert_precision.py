"""What experts in integers cost in accuracy: `python -m benchmarks.expert_precision MODEL [--texts N] [--tokens T]`.

The error of the next-token distribution behind every position of known texts, experts rounded to int8 and int4 against
those of the checkpoint, everything else the same; and the error of the weights. Texts are those of
`benchmarks.state_precision`: conversations as the demo models were trained on, or, with --random, random tokens.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.state_precision import BLOCK, compare, make_texts, read
from shards.comm import Comms
from shards.config import Bits
from shards.families import load_model_config
from shards.int_experts import ExpertChoice
from shards.int_weights import GROUP, round_rows
from shards.mesh import Layout, Place
from shards.rank import Rank, RankConfig
from shards.weights import CheckpointReader


def make_rank(args: argparse.Namespace, choice: ExpertChoice) -> Rank:
    """A loaded rank with room for a text."""
    config = RankConfig(
        model=args.model,
        place=Place(layout=Layout(), rank=0),
        dtype=args.dtype,
        expert_weights=choice,
        block_size=BLOCK,
        num_blocks=-(-args.tokens // BLOCK),
        num_slots=2,
        max_rows=2,
        max_model_len=args.tokens,
        threads=args.threads,
    )
    rank = Rank(config, Comms.local())
    rank.load()
    return rank


def distributions_of(args: argparse.Namespace, choice: ExpertChoice) -> Tensor:
    """Log probabilities behind all positions of all texts."""
    rank = make_rank(args, choice)
    found = torch.cat([read(rank, text) for text in make_texts(args)])
    rank.close()
    return found


def weight_error(model: Path, bits: Bits) -> float:
    """Root of the mean squared error of all experts over that of the weights."""
    reader = CheckpointReader(model, config=load_model_config(model))
    off = total = 0.0
    for name in sorted(name for name in reader.names() if ".experts." in name):
        weight = reader.read(name, dtype=torch.float32).flatten(0, -2)
        rows = round_rows(weight, bits)
        meant = rows.values_NK.float() * rows.scales_NG.float().repeat_interleave(GROUP, dim=1)
        off += (meant - weight).square().sum().item()
        total += weight.square().sum().item()
    return (off / total) ** 0.5


def main() -> None:
    """Print a line for each kind of experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--random", action="store_true", help="texts of random tokens")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    expected = distributions_of(args, "checkpoint")
    for choice in ("int8", "int4"):
        error = weight_error(args.model, 8 if choice == "int8" else 4)
        print(f"{choice}: weights off by {error:.2%};", compare(distributions_of(args, choice), expected), flush=True)


if __name__ == "__main__":
    main()
