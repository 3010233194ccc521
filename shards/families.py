"""The table of model families, and the reading of a checkpoint's config.json by it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from shards import qwen2_moe, qwen3, qwen3_5_moe, qwen3_moe, qwen3_next
from shards.config import ModelConfig
from shards.config_fields import Fields, read_json_object
from shards.family import Family

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen2_moe": qwen2_moe.FAMILY,
        "qwen3": qwen3.FAMILY,
        "qwen3_moe": qwen3_moe.FAMILY,
        "qwen3_next": qwen3_next.FAMILY,
        "qwen3_5_moe": qwen3_5_moe.MULTIMODAL_FAMILY,
        "qwen3_5_moe_text": qwen3_5_moe.TEXT_FAMILY,
    }
)
"""By the `model_type` of config.json."""


def load_model_config(path: Path) -> ModelConfig:
    """Read `path`/config.json.

    Raises:
        ValueError: naming file, field, value and remedy when the folder or file is missing or broken, the family is
            unknown, or a field is missing, of the wrong type, nonsensical, not supported, or unknown.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint folder; give a folder that holds config.json and safetensors")
    file = path / "config.json"
    return parse_model_config(Fields(read_json_object(file), str(file)))


def parse_model_config(fields: Fields) -> ModelConfig:
    """Build a ModelConfig from a config.json already parsed; errors as in `load_model_config`."""
    family = FAMILIES.get(fields.text("model_type"))
    if family is None:
        raise fields.error("model_type", f"known model families are {', '.join(FAMILIES)}")
    config = family.read(fields)
    fields.refuse_unread(family.harmless)
    return config
