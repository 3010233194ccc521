"""Writes a complete random checkpoint in the published Hugging Face layout: config, weights, tokenizer, template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from deploy.checkpoint_tensors import ExpertForm, TensorSpec, checkpoint_tensors, draw
from deploy.tokenizer_training import SpecialIds, save_tokenizer, special_ids, train_tokenizer
from router.errors import ConfigError
from shards.config import ModelConfig
from shards.config_fields import Fields, Json
from shards.families import FAMILIES, parse_model_config
from shards.family import Part

Size = Literal["tiny", "small"]
WeightDtype = Literal["bfloat16", "float32"]

_DTYPES: dict[WeightDtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SIZES: dict[Size, dict[str, Json]] = {
    "tiny": {
        "head_dim": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "small": {
        "head_dim": 128,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "max_position_embeddings": 32768,
        "num_attention_heads": 8,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
}
_PART_SIZES: dict[Part, dict[Size, dict[str, Json]]] = {
    "experts": {
        "tiny": {"moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4},
        "small": {"moe_intermediate_size": 192, "num_experts": 32, "num_experts_per_tok": 8},
    },
    "shared_expert": {
        "tiny": {"shared_expert_intermediate_size": 64},
        "small": {"shared_expert_intermediate_size": 192},
    },
    "delta": {
        "tiny": {
            "linear_key_head_dim": 32,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_value_head_dim": 32,
        },
        "small": {
            "linear_key_head_dim": 64,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 16,
            "linear_value_head_dim": 64,
        },
    },
}
_COMMON: dict[str, Json] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def write_random_checkpoint(
    arch: str,
    size: Size,
    seed: int,
    out: Path,
    *,
    overrides: Mapping[str, Json] | None = None,
    form: ExpertForm = "per_expert",
    dtype: WeightDtype = "bfloat16",
    max_shard_bytes: int = 1 << 30,
) -> ModelConfig:
    """Write a checkpoint that this server and transformers load; the same arguments give the same bytes.

    Args:
        arch: which model family, by its `model_type`.
        size: "tiny" is about 2.5 million parameters, "small" about 0.1 billion.
        seed: seeds the weights; the tokenizer does not depend on it.
        out: folder to fill; made when missing.
        overrides: fields of config.json to set, by their published names.
        form: experts one by one, as released, or fused into one tensor a layer.
        dtype: what the weights are stored in.
        max_shard_bytes: a safetensors file holds at most this much (or one tensor).

    Returns:
        The model's config, as `load_model_config(out)` reads it.

    Raises:
        ConfigError: unknown arch, size, form or dtype, a non-empty folder, or a config that cannot work.
    """
    _check_choices(arch=arch, size=size, form=form, dtype=dtype)
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    config = _config_fields(arch, size, dtype, overrides or {})
    _parse(config, out)  # before anything is written
    _check_folder(out)
    vocab_size = config["vocab_size"]
    assert isinstance(vocab_size, int)
    tokenizer = train_tokenizer(vocab_size)
    ids = special_ids(tokenizer)
    defaults: dict[str, Json] = {"bos_token_id": ids.end_of_text, "eos_token_id": ids.turn_end}
    config = dict(sorted((defaults | config).items()))
    model = _parse(config, out)
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", _generation_config(ids))
    save_tokenizer(tokenizer, out, model_max_length=model.max_position_embeddings)
    _write_weights(checkpoint_tensors(model, form), seed, out, _DTYPES[dtype], max_shard_bytes)
    return model


def _check_choices(*, arch: str, size: str, form: str, dtype: str) -> None:
    known = {
        "arch": (arch, tuple(name for name, family in FAMILIES.items() if family.published is not None)),
        "size": (size, tuple(_SIZES)),
        "form": (form, ("per_expert", "fused")),
        "dtype": (dtype, tuple(_DTYPES)),
    }
    for name, (value, choices) in known.items():
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out is {out}, which is a file; name a new or empty folder")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out is {out}, which is not empty; name a new or empty folder")


def _config_fields(arch: str, size: Size, dtype: WeightDtype, overrides: Mapping[str, Json]) -> dict[str, Json]:
    own: dict[str, Json] = {"model_type": arch, "torch_dtype": dtype, "transformers_version": "4.57.0"}
    family, fields = FAMILIES[arch], own | _COMMON | _SIZES[size]
    for part in family.parts:
        fields |= _PART_SIZES[part][size]
    return fields | dict(family.published or {}) | dict(overrides)


def _parse(config: Mapping[str, Json], out: Path) -> ModelConfig:
    try:
        return parse_model_config(Fields(config, str(out / "config.json")))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _generation_config(ids: SpecialIds) -> dict[str, Json]:
    return {
        "bos_token_id": ids.end_of_text,
        "do_sample": True,
        "eos_token_id": [ids.turn_end, ids.end_of_text],
        "pad_token_id": ids.end_of_text,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.57.0",
    }


def _write_weights(specs: list[TensorSpec], seed: int, out: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    shards = _cut_into_shards(specs, dtype.itemsize, max_shard_bytes)
    places: dict[str, Json] = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({spec.name: draw(spec, seed).to(dtype) for spec in shard}, out / name, metadata={"format": "pt"})
        places |= {spec.name: name for spec in shard}
    if len(shards) > 1:
        total_bytes = sum(spec.numel for spec in specs) * dtype.itemsize
        index: dict[str, Json] = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        _write_json(out / "model.safetensors.index.json", index)


def _cut_into_shards(specs: list[TensorSpec], itemsize: int, max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        size = spec.numel * itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += size
    return shards


def _write_json(path: Path, value: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
