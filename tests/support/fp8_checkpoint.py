"""A block-FP8 checkpoint made of a plain one, as Qwen releases them, and its twin of the same weights in bf16."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = (48, 32)
"""Divides few sizes of the tiny models, so that blocks at the ends are partial."""
_LARGEST = 448.0


def write_fp8_and_twin(plain: Path, folder: Path) -> tuple[Path, Path]:
    """Write `folder`/fp8 and `folder`/bf16 from a single-file checkpoint; gates, norms, head and embedding stay."""
    quantised: dict[str, Tensor] = {}
    twin: dict[str, Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            values, scales, meant = _quantise(weight.float())
            quantised |= {name: values, f"{name}_scale_inv": scales}
            twin[name] = meant
        else:
            quantised[name] = twin[name] = weight
    config = json.loads((plain / "config.json").read_text())
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    fp8 = _write(plain, folder / "fp8", quantised, config | {"quantization_config": method})
    return fp8, _write(plain, folder / "bf16", twin, config)


def _quantise(weight_RK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 values, float32 scales by block, and what they stand for; written with loops, unlike what reads it."""
    (rows, columns), (height, width) = weight_RK.shape, BLOCK
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // height), -(-columns // width))
    meant = torch.empty(rows, columns, dtype=torch.bfloat16)
    for i, row in enumerate(range(0, rows, height)):
        for j, column in enumerate(range(0, columns, width)):
            at = (slice(row, row + height), slice(column, column + width))
            scales[i, j] = weight_RK[at].abs().max().clamp_min(1e-12) / _LARGEST
            values[at] = (weight_RK[at] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[at] = (values[at].float() * scales[i, j]).to(torch.bfloat16)
    return values, scales, meant


def _write(plain: Path, folder: Path, tensors: dict[str, Tensor], config: object) -> Path:
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
