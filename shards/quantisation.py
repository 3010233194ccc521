"""quantization_config of a checkpoint: which quantised weights it holds. What cannot be read is refused by name.

Activations stay in the engine's dtype, so what the config says of those of FP8 is not looked at.
"""

import dataclasses
from typing import Final, cast

from shards.config import Bits, ModelConfig, PackedForm, PackedWeights
from shards.config_fields import Fields

_READ: Final = (
    "read are block-FP8 (quant_method fp8), and symmetric integers of 4 or 8 bits: quant_method gptq, or "
    "compressed-tensors of format pack-quantized; use such a checkpoint, or the bf16 release"
)


def with_quantisation(fields: Fields, config: ModelConfig) -> ModelConfig:
    """What the section says, where there is one."""
    section = fields.section("quantization_config")
    if section is None:
        return config
    match section.text("quant_method", ""):
        case "fp8":
            return dataclasses.replace(config, weight_block_size=_read_block(section))
        case "gptq":
            return dataclasses.replace(config, packed_weights=_read_gptq(section))
        case "compressed-tensors":
            return dataclasses.replace(config, packed_weights=_read_compressed(section))
        case _:
            raise section.error("quant_method", _READ)


def _read_block(section: Fields) -> tuple[int, int]:
    if section.text("fmt", "e4m3") != "e4m3":
        raise section.error("fmt", "only e4m3 is supported")
    block = section.integers("weight_block_size")
    if len(block) != 2 or not all(block):
        raise section.error("weight_block_size", "it must be two positive integers, such as [128, 128]")
    return block[0], block[1]


def _read_gptq(section: Fields) -> PackedWeights:
    if not section.flag("sym", True):
        raise section.error("sym", f"zero points are not supported; {_READ}")
    if section.flag("desc_act", False):
        raise section.error("desc_act", f"reordered columns are not supported; {_READ}")
    if section.text("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        raise section.error("checkpoint_format", "only gptq and gptq_v2 are supported")
    whole_rows = section.raw("group_size") == -1
    return _packed("gptq", section, "bits", 0 if whole_rows else section.integer("group_size"))


def _read_compressed(section: Fields) -> PackedWeights:
    if section.text("format", "") != "pack-quantized":
        raise section.error("format", _READ)
    groups = section.section("config_groups")
    if groups is None or len(names := groups.unread()) != 1:
        raise section.error("config_groups", "only one group of modules with one kind of weights is supported")
    group = groups.section(names[0])
    weights = None if group is None else group.section("weights")
    if group is None or weights is None:
        raise groups.error(names[0], "it must hold weights, an object")
    if group.present("input_activations"):
        raise group.error("input_activations", f"quantised activations are not supported; {_READ}")
    if weights.text("type", "int") != "int":
        raise weights.error("type", f"only int is supported; {_READ}")
    if not weights.flag("symmetric", True):
        raise weights.error("symmetric", f"zero points are not supported; {_READ}")
    strategy = weights.text("strategy", "group")
    if strategy not in ("group", "channel"):
        raise weights.error("strategy", "only group and channel are supported")
    return _packed("pack-quantized", weights, "num_bits", weights.integer("group_size") if strategy == "group" else 0)


def _packed(form: PackedForm, fields: Fields, name: str, group_size: int) -> PackedWeights:
    bits = fields.integer(name)
    if bits not in (4, 8):
        raise fields.error(name, f"only 4 and 8 are supported; {_READ}")
    return PackedWeights(form=form, bits=cast("Bits", bits), group_size=group_size)
