"""Models of a GPU's size without files: shapes, weights made up on the device, and seven ranks that one stands in for.

What `benchmarks.gpu_roofline` measures goes through `Rank` as a checkpoint's model does.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from typing_extensions import override

from shards.comm import Comms
from shards.config import ModelConfig
from shards.config_fields import Json
from shards.cuts import make_cuts
from shards.kernels.interface import Kernels
from shards.kernels.torch_kernels import TorchKernels
from shards.loading import Loader
from shards.mesh import Layout, Place
from shards.model import load_model
from shards.step_profile import StepProfile

Scale = Literal["full", "tiny"]
_ROOT = "model"
_HEAD = "lm_head.weight"

_COMMON: dict[str, Json] = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
_MOE_235B: dict[str, Json] = _COMMON | {
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
}
_NEXT_80B: dict[str, Json] = _COMMON | {
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000.0,
    "shared_expert_intermediate_size": 512,
}
_TINY_DIVISORS = {
    "head_dim": 4,
    "hidden_size": 32,
    "intermediate_size": 32,
    "linear_key_head_dim": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 4,
    "moe_intermediate_size": 16,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 16,
    "vocab_size": 256,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model and the layout of which rank 0 is measured."""

    fields: dict[str, Json]
    """config.json."""
    layout: Layout
    period: int
    """Layers after which their kinds repeat."""

    def config_fields(self, scale: Scale, layers: int) -> dict[str, Json]:
        """config.json with so many layers; tiny: every size a fraction of itself, for machines without a GPU."""
        fields = self.fields | {"num_hidden_layers": layers}
        if scale == "tiny":
            fields |= {name: cast(int, fields[name]) // by for name, by in _TINY_DIVISORS.items() if name in fields}
        return fields

    @property
    def layers(self) -> int:
        """Of the whole model."""
        return cast(int, self.fields["num_hidden_layers"])


SHAPES = {
    "qwen3-235b-ep8": ModelShape(fields=_MOE_235B, layout=Layout(dp=8, ep=8), period=1),
    # The same matrices without the exchange: ranks in groups are not captured, so this is what a capture could give.
    "qwen3-235b-16-experts": ModelShape(fields=_MOE_235B | {"num_experts": 16}, layout=Layout(), period=1),
    "qwen3-next-80b": ModelShape(fields=_NEXT_80B, layout=Layout(), period=4),
}


def write_config(folder: Path, fields: dict[str, Json]) -> None:
    """A checkpoint folder that holds a config and no weights."""
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


class RandomWeights:
    """A `WeightSource` that makes tensors up on a device, and counts what it made."""

    def __init__(self, device: torch.device, *, zero_centred_norm: bool) -> None:
        self.root = _ROOT
        self.num_bytes = 0
        """Of all weights."""
        self.embedding = 0
        """Numbers of the embedding table; then of the head, of one expert, and of everything else."""
        self.head = 0
        self.expert = 0
        self.other = 0
        self.moe_layers = 0
        self._device = device
        self._norm = 0.0 if zero_centred_norm else 1.0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._random = torch.Generator("cpu" if device.type == "meta" else device)
        self._random.manual_seed(1)

    def head_name(self, *, tied: bool) -> str:
        """As `WeightSource`."""
        return f"{_ROOT}.embed_tokens.weight" if tied else _HEAD

    def expect(self, name: str, shape: Sequence[int]) -> None:
        """Whatever is expected is there."""
        self._shapes[name] = tuple(shape)

    def read(self, name: str, *slices: slice, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """As `WeightSource`."""
        if out is None:
            whole = self._shapes[name]
            taken = [len(range(*part.indices(size))) for part, size in zip(slices, whole, strict=False)]
            out = torch.empty(*taken, *whole[len(taken) :], dtype=dtype, device=self._device)
        self._fill(name, out)
        if name == _HEAD:
            self.head += out.numel()
        elif name.endswith("embed_tokens.weight"):
            self.embedding += out.numel()
        else:
            self.other += out.numel()
        return out

    def read_experts(
        self,
        prefix: str,
        experts: range,
        columns: slice,
        *,
        expect: tuple[int, int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `WeightSource`."""
        assert expect is not None
        hidden, width = expect[2], columns.stop - columns.start
        shapes = ((len(experts), 2 * width, hidden), (len(experts), hidden, width))
        gate_up, down = (torch.empty(shape, dtype=dtype, device=self._device) for shape in shapes)
        self._fill(prefix, gate_up)
        self._fill(prefix, down)
        self.expert = 3 * width * hidden
        self.moe_layers += 1
        return gate_up, down

    def finish(self, ignored_prefixes: tuple[str, ...]) -> None:
        """Nothing is left over."""

    def _fill(self, name: str, out: Tensor) -> None:
        """Values of a size that activations keep, so that no number overflows and experts are chosen evenly."""
        self.num_bytes += out.numel() * out.dtype.itemsize
        if name.endswith(("A_log", "dt_bias")):
            out.zero_()
        elif "norm" in name:
            out.fill_(1.0 if "linear_attn" in name else self._norm)
        else:
            out.normal_(0.0, out.shape[-1] ** -0.5, generator=self._random)


def count_weights(config: ModelConfig, place: Place, dtype: torch.dtype) -> RandomWeights:
    """The counts of a rank's weights, of which none is made."""
    device = torch.device("meta")
    weights = RandomWeights(device, zero_centred_norm=config.zero_centred_norm)
    cuts = make_cuts(config, place, deterministic=False)
    kernels = TorchKernels()
    load_model(Loader(reader=weights, config=config, cuts=cuts, dtype=dtype, device=device, kernels=kernels))
    return weights


class HitCounter(StepProfile):
    """Counts the experts that a step hits. As with every profile, the rank's steps are not captured."""

    def __init__(self) -> None:
        super().__init__()
        self._hits: list[int] | None = None

    def count(self, step: Callable[[], object]) -> list[int]:
        """Carry out a step -> hit experts of each layer that has any, in order."""
        hits: list[int] = []
        self._hits = hits
        step()
        self._hits = None
        return hits

    @override
    def timed_kernels(self, kernels: Kernels) -> Kernels:
        """The same operators, looked at."""
        return cast("Kernels", _Counted(kernels, self))

    @override
    def timed_comms(self, comms: Comms) -> Comms:
        """The same groups."""
        return comms

    def see(self, ids_TK: Tensor) -> None:
        """The experts of one layer; < 0: held elsewhere."""
        if self._hits is not None:
            self._hits.append(ids_TK[ids_TK >= 0].unique().numel())


class _Counted:
    """Stands for kernels whose experts are counted."""

    def __init__(self, inner: Kernels, counter: HitCounter) -> None:
        self._inner = inner
        self._counter = counter

    def __getattr__(self, name: str) -> object:
        found = getattr(self._inner, name)
        # Found without this method from now on.
        setattr(self, name, found)
        return found

    def experts(
        self, x_TC: Tensor, ids_TK: Tensor, gate_up: Tensor, down: Tensor, *, groups: int = 1, wide: bool = False
    ) -> Tensor:
        self._counter.see(ids_TK)
        return self._inner.experts(x_TC, ids_TK, gate_up, down, groups=groups, wide=wide)

    def weighted_experts(
        self, x_TC: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, *, groups: int = 1
    ) -> Tensor:
        self._counter.see(ids_TK)
        return self._inner.weighted_experts(x_TC, ids_TK, weights_TK, gate_up, down, groups=groups)
