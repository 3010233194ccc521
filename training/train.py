"""Trains a demo model: `python -m training.train --family qwen3_next --work FOLDER`; ends with a checkpoint there.

Started again with the same folder it goes on where it was; all that is random depends on the seed and the pool.
"""

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.tokenizer import TextTokenizer
from training.checkpoint import export
from training.configs import FAMILIES, Family, config_fields, model_config
from training.encoding import Batch, batches, make_tokenizer
from training.model import Model, Outputs
from training.muon import Muon

logger = logging.getLogger(__name__)

_MTP_WEIGHT = 0.3
_BALANCE_WEIGHT = 0.01
_WARM_UP_POOLS = 1
_COOL_DOWN_SHARE = 0.35
_SAVE_EVERY_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides the result, besides the machine's arithmetic."""

    family: Family
    seed: int = 0
    pools: int = 300
    """Rounds of 512 examples."""
    tokens_a_batch: int = 1024
    matrix_lr: float = 0.02
    other_lr: float = 0.003


class Trainer:
    """Model, optimizers and how many pools they have seen."""

    def __init__(self, recipe: Recipe, tokenizer: TextTokenizer) -> None:
        torch.manual_seed(recipe.seed)
        self._recipe, self._tokenizer = recipe, tokenizer
        self.model = Model(model_config(recipe.family))
        matrices = [p for name, p in self.model.named_parameters() if _is_hidden_matrix(name, p)]
        others = [p for name, p in self.model.named_parameters() if not _is_hidden_matrix(name, p)]
        self._muon = Muon(matrices)
        self._adam = torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.pool = 0

    def run_pool(self) -> str:
        """Train on the next pool; returns a line about it."""
        made = batches(self._tokenizer, self._recipe.seed, self.pool, self._recipe.tokens_a_batch)
        sums, started = torch.zeros(4), time.perf_counter()
        for index, batch in enumerate(made):
            sums += self._step(batch, self._rate(self.pool + index / len(made)))
        tokens = sum(batch.tokens_BT.numel() for batch in made)
        self.pool += 1
        loss, mtp, balance, correct = (sums / len(made)).tolist()
        rate = tokens / (time.perf_counter() - started)
        return (
            f"pool {self.pool} steps {len(made)} loss {loss:.4f} mtp {mtp:.4f} balance {balance:.3f} "
            f"tokens right {correct:.4f} tokens/s {rate:.0f}"
        )

    def _rate(self, pools: float) -> float:
        """Factor of the learning rates after so many pools: warm up, hold, then down to zero in a straight line."""
        left = (self._recipe.pools - pools) / (self._recipe.pools * _COOL_DOWN_SHARE)
        return min(1.0, (pools + 0.1) / _WARM_UP_POOLS, left)

    def _step(self, batch: Batch, rate: float) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.model(batch.tokens_BT)
        loss, mtp = _losses(outputs, batch.targets_BT)
        (loss + _MTP_WEIGHT * mtp + _BALANCE_WEIGHT * outputs.balance).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._muon.step(self._recipe.matrix_lr * rate)
        for group in self._adam.param_groups:
            group["lr"] = self._recipe.other_lr * rate
        self._adam.step()
        self.model.zero_grad()
        wanted = batch.targets_BT >= 0
        correct = (outputs.logits_BTV.detach().argmax(-1) == batch.targets_BT)[wanted].float().mean()
        return torch.stack([loss.detach(), mtp.detach(), outputs.balance.detach(), correct])

    def save(self, file: Path) -> None:
        """Write all that is needed to go on; the old file stays until the new one is whole."""
        partial = file.with_suffix(".partial")
        state = {"model": self.model.state_dict(), "adam": self._adam.state_dict(), "muon": self._muon.momenta}
        torch.save(state | {"pool": self.pool}, partial)
        partial.rename(file)

    def load(self, file: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._adam.load_state_dict(state["adam"])
        for momentum, saved in zip(self._muon.momenta, state["muon"], strict=True):
            momentum.copy_(saved)
        self.pool = state["pool"]


def _losses(outputs: Outputs, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token, and of the MTP head's one after it (zero without a head)."""
    loss = functional.cross_entropy(outputs.logits_BTV.float().flatten(0, 1), targets_BT.flatten())
    if outputs.mtp_logits_BTV is None:
        return loss, torch.zeros(())
    return loss, functional.cross_entropy(outputs.mtp_logits_BTV.float().flatten(0, 1), targets_BT[:, 1:].flatten())


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and ("_proj" in name or "mtp.fc" in name)


def train(recipe: Recipe, work: Path) -> Path:
    """Train to the end, or on from what is in `work`; returns the checkpoint's folder."""
    out, state = work / recipe.family, work / f"{recipe.family}.pt"
    trainer = Trainer(recipe, make_tokenizer(out))
    if state.exists():
        trainer.load(state)
    saved_at = time.monotonic()
    while trainer.pool < recipe.pools:
        logger.info("%s", trainer.run_pool())
        if time.monotonic() - saved_at > _SAVE_EVERY_S:
            trainer.save(state)
            saved_at = time.monotonic()
    trainer.save(state)
    export(trainer.model, config_fields(recipe.family), out)
    return out


def main() -> None:
    """Read the command line and train."""
    defaults = Recipe(family="qwen3_next")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the state and the checkpoint")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--pools", type=int, default=defaults.pools, help="rounds of 512 examples")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given.work.mkdir(parents=True, exist_ok=True)
    train(Recipe(family=given.family, seed=given.seed, pools=given.pools), given.work)


if __name__ == "__main__":
    main()
