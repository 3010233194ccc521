"""Writes a trained model as a checkpoint in the published layout, bfloat16, experts one by one; and reads it back."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from deploy.tokenizer_training import special_ids
from shards.config_fields import Json
from shards.families import load_model_config
from training.model import Model


def export(model: Model, config: Mapping[str, Json], folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors beside the tokenizer in `folder`.

    Args:
        config: what config.json says of the model, without token ids.
    """
    ids = special_ids(Tokenizer.from_file(str(folder / "tokenizer.json")))
    fields: dict[str, Json] = {"bos_token_id": ids.end_of_text, "eos_token_id": ids.turn_end}
    _write_json(folder / "config.json", dict(sorted({**config, **fields}.items())))
    generation: dict[str, Json] = {
        "bos_token_id": ids.end_of_text,
        "do_sample": False,
        "eos_token_id": [ids.turn_end, ids.end_of_text],
        "pad_token_id": ids.end_of_text,
    }
    _write_json(folder / "generation_config.json", generation)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in _published(model.state_dict())}
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Model:
    """The model of a checkpoint that `export` wrote, in float32."""
    config = load_model_config(folder)
    model = Model(config)
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    state = {name: value for name, value in tensors.items() if ".experts." not in name}
    for prefix in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        parts = [
            [tensors[f"{prefix}.experts.{expert}.{part}_proj.weight"] for expert in range(config.num_experts)]
            for part in ("gate", "up", "down")
        ]
        gates, ups, downs = (torch.stack(part) for part in parts)
        state[f"{prefix}.experts.gate_up_proj"] = torch.cat([gates, ups], dim=1)
        state[f"{prefix}.experts.down_proj"] = downs
    model.load_state_dict(state)
    return model


def _published(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}"
                gate, up = both.chunk(2)
                # Clones: safetensors refuses two tensors in one storage.
                yield f"{prefix}.gate_proj.weight", gate.clone()
                yield f"{prefix}.up_proj.weight", up.clone()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                yield f"{name.removesuffix('down_proj')}{expert}.down_proj.weight", down.clone()
        else:
            yield name, value


def _write_json(path: Path, value: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
