"""Checkpoints with a multi-token prediction head, what such a head should draft, and ranks driven with drafts."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
)

from shards.batch import LaneOutput, StepBatch
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import KernelsName
from tests.support.reference import make_reference
from tests.support.stepping import Work, lane_starts, make_rank
from tests.support.thread_comm import on_every_rank

WEIGHTS = "model.safetensors"
_NORMS = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
_LAYER = 1
"""The head's layer looks like this one of the main model: full attention."""


def make_mtp_reference(folder: Path, *, disturbance: float | None = None, seed: int = 0) -> PreTrainedModel:
    """A random Qwen3-Next checkpoint with a head, whose drafts are mostly wrong, unless `disturbance` is given.

    Then embedding and output head by themselves follow each token by one fixed token, in the main model and in the
    head, and the outputs of all layers, scaled by `disturbance`, change that: at 1 most drafts are right, at 2 few.
    """
    model = make_reference(folder, "qwen3_next", seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    config = model.config
    assert isinstance(config, Qwen3NextConfig)
    hidden = config.hidden_size
    mtp = {f"layers.0.{name}": value for name, value in Qwen3NextDecoderLayer(config, _LAYER).state_dict().items()}
    for name, value in mtp.items():
        noise = torch.randn(value.shape, generator=generator)
        mtp[name] = 0.2 * noise if value.dim() == 1 else noise * value.shape[-1] ** -0.5
    for name in _NORMS:
        mtp[f"{name}.weight"] = 0.2 * torch.randn(hidden, generator=generator)
    mtp["fc.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * (2 * hidden) ** -0.5
    if disturbance is not None:
        _make_alike(model, mtp, disturbance)
        model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS) | {f"mtp.{name}": value for name, value in mtp.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return model


@torch.no_grad()
def _make_alike(model: PreTrainedModel, mtp: dict[str, Tensor], disturbance: float) -> None:
    tensors = model.state_dict()
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"].copy_(embedding.roll(1, dims=0))
    hidden = embedding.shape[1]
    mtp["fc.weight"] = torch.cat((torch.eye(hidden), disturbance * mtp["fc.weight"][:, hidden:]), dim=1)
    for name, value in (*tensors.items(), *mtp.items()):
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")):
            value *= disturbance


class MtpReference:
    """What the head of a checkpoint computes, in plain torch with transformers' layer."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._model = model
        config = model.config
        assert isinstance(config, Qwen3NextConfig)
        tensors = {name[4:]: value for name, value in load_file(folder / WEIGHTS).items() if name.startswith("mtp.")}
        self._fc = tensors.pop("fc.weight")
        self._rotary = Qwen3NextRotaryEmbedding(config)
        self._layer = Qwen3NextDecoderLayer(config, _LAYER).eval()
        self._norms = torch.nn.ModuleDict(
            {name: Qwen3NextRMSNorm(config.hidden_size, config.rms_norm_eps) for name in _NORMS}
        )
        prefix = "layers.0."
        layer = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        self._layer.load_state_dict(layer)
        self._norms.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(prefix)})

    @torch.no_grad()
    def drafts(self, tokens: list[int], count: int) -> list[int]:
        """The head's drafts behind `tokens`, whose last one the main model has not seen yet."""
        hidden_TC = self._model.model(torch.tensor([tokens[:-1]]), use_cache=False).last_hidden_state[0]
        drafts: list[int] = []
        for _ in range(count):
            out_TC = self._forward([*tokens, *drafts][1:], hidden_TC)
            drafts.append(int(self._model.lm_head(out_TC[-1]).argmax()))
            # Positions of the main model keep its hidden states; a draft's position has the head's own.
            hidden_TC = torch.cat((hidden_TC, out_TC[-1:]))
        return drafts

    def _forward(self, next_tokens: list[int], hidden_TC: Tensor) -> Tensor:
        embedded_TC = self._model.model.embed_tokens(torch.tensor(next_tokens))
        sides = (self._norms["pre_fc_norm_embedding"](embedded_TC), self._norms["pre_fc_norm_hidden"](hidden_TC))
        x_TC = torch.cat(sides, dim=-1) @ self._fc.T
        T = x_TC.shape[0]
        mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
        positions = self._rotary(x_TC[None], torch.arange(T)[None])
        out = self._layer(x_TC[None], position_embeddings=positions, attention_mask=mask)
        out = out[0] if isinstance(out, tuple) else out
        return self._norms["norm"](out[0])


Policy = Callable[[int, int], int]
"""(row, step) -> drafts to make behind the row."""


def speculate(
    folder: Path,
    work: Work,
    policy: Policy,
    layout: Layout | None = None,
    *,
    draft_tokens: int,
    kernels: KernelsName = "native",
    dtype: str = "float32",
    shared_memory: bool = False,
) -> tuple[list[list[int]], list[list[int]], list[LaneOutput]]:
    """Carry out `work` with drafts -> each prompt's tokens, the tokens each of its steps gave, and lane 0's answers.

    shared_memory: as in `on_every_rank`.
    """
    layout = layout or Layout()
    most_steps = work.new_tokens + max(-(-len(prompt) // work.chunk) for prompt in work.prompts)

    def on_rank(place: Place, comms: Comms) -> list[LaneOutput]:
        rank = make_rank(
            folder,
            place,
            comms,
            max_rows=len(work.prompts),
            kernels=kernels,
            dtype=dtype,
            draft_tokens=draft_tokens,
        )
        lane = _Lane(work, place, policy)
        outputs: list[LaneOutput] = []
        for step in range(most_steps):
            output = rank.step(lane.batch(step))
            counts = lane.counts(output)
            lane.advance(comms.tp.broadcast(torch.tensor(counts, dtype=torch.int64), 0).tolist())
            outputs += [output] if output is not None else []
        rank.close()
        return outputs

    answers = [outputs for outputs in on_every_rank(layout, on_rank, shared_memory=shared_memory) if outputs]
    tokens: list[list[int]] = [[] for _ in work.prompts]
    counts: list[list[int]] = [[] for _ in work.prompts]
    for lane, outputs in enumerate(answers):
        for output in outputs:
            at = 0
            for i, row in enumerate(output.rows_N):
                count = output.counts_N[i] if output.counts_N else 1
                tokens[row * layout.dp + lane] += output.tokens_N[at : at + count]
                counts[row * layout.dp + lane].append(count)
                at += count
    return tokens, counts, answers[0]


class _Lane:
    """How far the rows of one lane are."""

    def __init__(self, work: Work, place: Place, policy: Policy) -> None:
        dp = place.layout.dp
        self._starts = lane_starts(work, place.dp_rank, dp)
        self._work = work
        self._policy = policy
        self._prompt_lens = [start.prompt_len for start in self._starts]
        self._lens = list(self._prompt_lens)
        """Known tokens of each row."""
        self._done = [0] * len(self._starts)
        self._ready = [0] * len(self._starts)
        self._sampling: list[int] = []

    def batch(self, step: int) -> StepBatch:
        batch = StepBatch(starts=self._starts if step == 0 else ())
        self._sampling = []
        for row, length in enumerate(self._prompt_lens):
            if self._lens[row] >= length + self._work.new_tokens:
                continue
            waiting = self._lens[row] - self._done[row]
            ready = self._ready[row] if waiting == 1 else 0
            count = min(waiting, self._work.chunk) + ready
            samples = count >= waiting
            drafts = self._policy(row, step) if samples else 0
            batch.rows_S.append(row)
            batch.first_S.append(self._done[row])
            batch.counts_S.append(count)
            batch.samples_S.append(int(samples))
            batch.verifies_S.append(ready)
            batch.drafts_S.append(drafts)
            self._done[row] += count - ready
            self._ready[row] = drafts
            self._sampling += [row] if samples else []
        return batch

    def counts(self, output: LaneOutput | None) -> list[int]:
        if output is None:
            return [0] * len(self._sampling)
        return output.counts_N or [1] * len(output.rows_N)

    def advance(self, counts: list[int]) -> None:
        for row, count in zip(self._sampling, counts, strict=True):
            self._lens[row] += count
            self._done[row] = self._lens[row] - 1
