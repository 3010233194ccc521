"""Checkpoints of integer weights made of a plain one, as they are published, and their twin of the same weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.config import Bits, PackedForm


@dataclass(frozen=True, slots=True, kw_only=True)
class IntForm:
    """One published way to hold integers."""

    form: PackedForm
    bits: Bits
    group: int
    """-1: whole rows."""
    old_zeros: bool = True
    """gptq: zero points are stored less one."""

    @property
    def method(self) -> dict[str, object]:
        """The section quantization_config."""
        if self.form == "gptq":
            return {
                "quant_method": "gptq",
                "bits": self.bits,
                "group_size": self.group,
                "sym": True,
                "desc_act": False,
                "checkpoint_format": "gptq",
                "lm_head": False,
                "pack_dtype": "int32",
            }
        strategy: dict[str, object] = {"strategy": "channel", "group_size": None}
        if self.group > 0:
            strategy = {"strategy": "group", "group_size": self.group}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*mlp.gate$"],
            "quantization_status": "compressed",
        }


def write_ints_and_twin(plain: Path, folder: Path, form: IntForm) -> tuple[Path, Path]:
    """Write `folder`/ints and `folder`/twin (float32) from a single-file checkpoint with experts stored one by one.

    Gates, norms, head, embedding and the multi-token prediction head stay as they are, as in releases.
    """
    ints: dict[str, Tensor] = {}
    twin: dict[str, Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight") and not name.startswith("mtp."):
            values, scales = _round(weight.float(), form)
            stem = name.removesuffix(".weight")
            ints |= pack(stem, values, scales, form)
            group = weight.shape[1] // scales.shape[1]
            twin[name] = values.float() * scales.float().repeat_interleave(group, dim=1)
        else:
            ints[name] = twin[name] = weight
    config = json.loads((plain / "config.json").read_text())
    folder_of_ints = write_like(plain, folder / "ints", ints, config | {"quantization_config": form.method})
    return folder_of_ints, write_like(plain, folder / "twin", twin, config)


def pack(stem: str, values_NK: Tensor, scales_NG: Tensor, form: IntForm) -> dict[str, Tensor]:
    """The tensors that stand for one weight; written with loops, unlike what reads them."""
    (rows, columns), a_word, middle = values_NK.shape, 32 // form.bits, 1 << (form.bits - 1)
    words = torch.zeros(rows, -(-columns // a_word), dtype=torch.int64)
    for column in range(columns):
        words[:, column // a_word] += (values_NK[:, column].long() + middle) << form.bits * (column % a_word)
    packed = _int32(words)
    if form.form == "pack-quantized":
        return {
            f"{stem}.weight_packed": packed,
            f"{stem}.weight_scale": scales_NG.to(torch.bfloat16),
            f"{stem}.weight_shape": torch.tensor([rows, columns]),
        }
    zero = middle - 1 if form.old_zeros else middle
    zeros = sum(zero << form.bits * place for place in range(a_word))
    groups = scales_NG.shape[1]
    return {
        f"{stem}.qweight": packed.T.contiguous(),
        f"{stem}.scales": scales_NG.T.contiguous(),
        f"{stem}.qzeros": _int32(torch.full((groups, rows // a_word), zeros)),
        f"{stem}.g_idx": torch.tensor([column * groups // columns for column in range(columns)], dtype=torch.int32),
    }


def write_like(plain: Path, folder: Path, tensors: dict[str, Tensor], config: object) -> Path:
    """A checkpoint of these tensors and config with all else of `plain`."""
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _round(weight_NK: Tensor, form: IntForm) -> tuple[Tensor, Tensor]:
    """Integers and their scales [N, G]: float16 in gptq, such as bfloat16 holds in pack-quantized."""
    (rows, columns), largest = weight_NK.shape, (1 << (form.bits - 1)) - 1
    group = columns if form.group < 0 else form.group
    values = torch.empty(rows, columns, dtype=torch.int8)
    dtype = torch.float16 if form.form == "gptq" else torch.bfloat16
    scales = torch.empty(rows, columns // group, dtype=dtype)
    for place, first in enumerate(range(0, columns, group)):
        part = weight_NK[:, first : first + group]
        scales[:, place] = (part.abs().amax(1) / largest).clamp_min(1e-6).to(dtype)
        values[:, first : first + group] = (
            (part / scales[:, place : place + 1].float()).round().clamp(-largest, largest)
        )
    return values, scales


def _int32(words: Tensor) -> Tensor:
    """The same 32 bits as a number with a sign."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
