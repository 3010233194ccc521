import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoConfig

from shards.config import ModelConfig, PackedWeights
from shards.families import load_model_config
from shards.generation_config import load_generation_config
from tests.support.released_configs import RELEASED, RELEASED_3_5_TEXT

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def packed(input_activations: object = None, **weights: object) -> dict[str, object]:
    """quantization_config of compressed-tensors, as Qwen3-MoE checkpoints of 4 bits have it."""
    known = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": known | weights, "input_activations": input_activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


PACKED = packed()


def write_config(folder: Path, arch: str, changes: dict[str, object], *, drop: tuple[str, ...] = ()) -> Path:
    values = {name: value for name, value in {**RELEASED[arch], **changes}.items() if name not in drop}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def load(folder: Path, arch: str = "qwen3_moe", *, drop: tuple[str, ...] = (), **changes: object) -> ModelConfig:
    return load_model_config(write_config(folder, arch, changes, drop=drop))


def test_released_qwen3_moe_config_is_read(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.architecture, config.head_dim, config.num_experts) == ("qwen3_moe", 128, 128)
    assert (config.rope.theta, config.rope.rotary_dim, config.rope.type) == (1e6, 128, "default")
    assert config.layer_types == ("full_attention",) * 48
    assert (config.eos_token_ids, config.shared_expert_intermediate_size) == ((151645,), 0)
    assert not config.zero_centred_norm
    assert not config.attention_gated
    assert all(config.is_moe_layer(i) for i in range(48))


def test_released_qwen3_next_config_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, "qwen3_next")
    assert config.attention_layers == tuple(range(3, 48, 4))
    assert len(config.delta_layers) == 36
    assert (config.rope.theta, config.rope.rotary_dim) == (1e7, 64)
    assert (config.linear_num_key_heads, config.linear_num_value_heads, config.linear_conv_kernel_dim) == (16, 32, 4)
    assert config.zero_centred_norm
    assert config.attention_gated


def test_released_qwen2_moe_config_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, "qwen2_moe")
    assert (config.qkv_bias, config.o_proj_bias, config.qk_norm) == (True, False, False)
    assert (config.head_dim, config.shared_expert_intermediate_size, config.norm_topk_prob) == (128, 5632, False)
    assert load(tmp_path, "qwen2_moe", drop=("norm_topk_prob",)).norm_topk_prob is False


def test_released_dense_config_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, "qwen3")
    assert (config.num_experts, config.intermediate_size, config.tie_word_embeddings) == (0, 3072, True)
    assert not any(config.is_moe_layer(i) for i in range(28))
    assert load(tmp_path, "qwen3", drop=("head_dim",)).head_dim == 128


def test_text_config_of_a_multimodal_model_is_read_as_the_text_model(tmp_path: Path) -> None:
    text, whole = load(tmp_path, "qwen3_5_moe_text"), load(tmp_path, "qwen3_5_moe")
    assert dataclasses.replace(whole, unused_tensors=()) == text
    assert whole.unused_tensors == ("model.visual.",)
    assert (text.architecture, text.linear_split_projections, text.norm_topk_prob) == ("qwen3_5_moe_text", True, True)
    assert (text.rope.theta, text.rope.rotary_dim, text.num_nextn_predict_layers) == (1e7, 64, 1)
    assert len(text.delta_layers) == 30
    assert text.attention_gated
    assert text.zero_centred_norm


@pytest.mark.parametrize("arch", ["qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["default", "yarn"])
def test_config_saved_by_transformers_reads_as_the_released_one(
    tmp_path: Path, arch: str, scaling: dict[str, object] | None
) -> None:
    released, saved = tmp_path / "released", tmp_path / "saved"
    released.mkdir()
    write_config(released, arch, {"rope_scaling": scaling})
    AutoConfig.from_pretrained(released).save_pretrained(saved)
    assert "rope_parameters" in json.loads((saved / "config.json").read_text())
    assert load_model_config(saved) == load_model_config(released)
    assert load_model_config(saved).fingerprint() == load_model_config(released).fingerprint()


def test_fingerprint_changes_with_any_field(tmp_path: Path) -> None:
    assert load(tmp_path).fingerprint() != load(tmp_path, rope_theta=1e7).fingerprint()


def test_dense_layers_follow_sparse_step_and_mlp_only_layers(tmp_path: Path) -> None:
    config = load(tmp_path, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [config.is_moe_layer(i) for i in range(6)] == [False, True, False, False, False, True]


def test_sections_of_integer_checkpoints_are_read(tmp_path: Path) -> None:
    def read(section: Mapping[str, object]) -> PackedWeights | None:
        return load(tmp_path, quantization_config=section).packed_weights

    assert read(GPTQ) == PackedWeights(form="gptq", bits=4, group_size=128)
    whole = {**GPTQ, "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2", "dynamic": {"-:.*attn.*": True}}
    assert read(whole) == PackedWeights(form="gptq", bits=8, group_size=0)
    assert read(PACKED) == PackedWeights(form="pack-quantized", bits=4, group_size=128)
    channel = packed(num_bits=8, strategy="channel", group_size=None)
    assert read(channel) == PackedWeights(form="pack-quantized", bits=8, group_size=0)
    assert load(tmp_path).packed_weights is None


def test_missing_head_dim_is_hidden_size_over_heads(tmp_path: Path) -> None:
    assert load(tmp_path, drop=("head_dim",)).head_dim == 64


def test_missing_head_dim_is_256_for_qwen3_next_as_in_transformers(tmp_path: Path) -> None:
    assert load(tmp_path, "qwen3_next", drop=("head_dim",), num_attention_heads=8).head_dim == 256


def test_yarn_fields_are_read(tmp_path: Path) -> None:
    scaling = {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "mscale": 0.7, "truncate": False}
    rope = load(tmp_path, rope_scaling={**scaling, "mscale_all_dim": 0.5}).rope
    assert (rope.type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 8192)
    assert (rope.beta_fast, rope.beta_slow, rope.attention_factor) == (16, 2, 1.5)
    assert (rope.mscale, rope.mscale_all_dim, rope.truncate) == (0.7, 0.5, False)


def test_yarn_without_factor_derives_it_from_both_lengths(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "original_max_position_embeddings": 10240}
    assert load(tmp_path, rope_scaling=scaling).rope.factor == 4.0


def test_a_released_model_with_yarn_added_takes_positions_up_to_the_stretched_length(tmp_path: Path) -> None:
    section = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    assert load(tmp_path, "qwen3_next").max_position_embeddings == 262144
    assert load(tmp_path, "qwen3_next", rope_scaling=section).max_position_embeddings == 4 * 262144
    # A length that was raised too is not stretched once more.
    longer = load(tmp_path, "qwen3_next", rope_scaling=section, max_position_embeddings=1_100_000)
    assert longer.max_position_embeddings == 1_100_000


@pytest.mark.parametrize(
    ("arch", "changes", "told"),
    [
        ("qwen3_moe", {"model_type": "llama"}, ["model_type", '"llama"', "qwen2_moe, qwen3, qwen3_moe, qwen3_next"]),
        ("qwen3_moe", {"hidden_act": "gelu"}, ["hidden_act", '"gelu"', "silu"]),
        ("qwen3_moe", {"use_sliding_window": True}, ["use_sliding_window", "true"]),
        (
            "qwen3_moe",
            {"quantization_config": {"quant_method": "awq"}},
            ["quant_method", '"awq"', "or the bf16 release"],
        ),
        ("qwen3_moe", {"quantization_config": {**GPTQ, "sym": False}}, ["sym", "zero points are not supported"]),
        ("qwen3_moe", {"quantization_config": {**GPTQ, "desc_act": True}}, ["desc_act", "reordered columns"]),
        ("qwen3_moe", {"quantization_config": {**GPTQ, "bits": 3}}, ["bits is 3", "only 4 and 8"]),
        (
            "qwen3_moe",
            {"quantization_config": {**GPTQ, "checkpoint_format": "marlin"}},
            ["checkpoint_format", "marlin"],
        ),
        ("qwen3_moe", {"quantization_config": {**GPTQ, "group_size": 0}}, ["group_size is 0", "at least 1"]),
        ("qwen3_moe", {"quantization_config": {**PACKED, "format": "int-quantized"}}, ["format", '"int-quantized"']),
        ("qwen3_moe", {"quantization_config": {**PACKED, "config_groups": {}}}, ["config_groups", "only one group"]),
        ("qwen3_moe", {"quantization_config": packed(symmetric=False)}, ["symmetric", "zero points"]),
        ("qwen3_moe", {"quantization_config": packed(type="float")}, ["type", '"float"', "only int"]),
        ("qwen3_moe", {"quantization_config": packed(strategy="block")}, ["strategy", "only group and channel"]),
        ("qwen3_moe", {"quantization_config": packed({"num_bits": 8})}, ["input_activations", "quantised activations"]),
        ("qwen3_moe", {"quantization_config": packed(num_bits=2)}, ["num_bits is 2", "only 4 and 8"]),
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size", "such as [128, 128]"]),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_type", '"linear"', "yarn"]),
        ("qwen3_moe", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["type", '"dynamic"']),
        ("qwen3_moe", {"rope_scaling": {**YARN, "mrope_section": [1]}}, ["mrope_section", "remove it"]),
        ("qwen3_moe", {"rope_scaling": {**YARN, "factor": 0.5}}, ["factor", "0.5", "at least 1"]),
        (
            "qwen3_moe",
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 50000}},
            ["original_max_position_embeddings", "50000", "not be above max_position_embeddings, 40960"],
        ),
        ("qwen3_moe", {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, ["beta_fast", "beta_slow"]),
        ("qwen3_moe", {"rope_scaling": YARN, "rope_parameters": YARN}, ["rope_scaling", "rope_parameters"]),
        ("qwen3_moe", {"rope_scaling": 3}, ["rope_scaling", "object"]),
        ("qwen3_next", {"partial_rotary_factor": 0.01171875}, ["partial_rotary_factor", "even"]),
        ("qwen3_next", {"partial_rotary_factor": 2.0}, ["partial_rotary_factor", "even"]),
        ("qwen3_moe", {"hidden_size": "big"}, ["hidden_size", '"big"', "integer"]),
        ("qwen3_moe", {"hidden_size": True}, ["hidden_size", "integer"]),
        ("qwen3_moe", {"vocab_size": -1}, ["vocab_size", "-1", "at least 1"]),
        ("qwen3_moe", {"rms_norm_eps": 0}, ["rms_norm_eps", "above 0"]),
        ("qwen3_moe", {"rms_norm_eps": "x"}, ["rms_norm_eps", "above 0"]),
        ("qwen3_moe", {"norm_topk_prob": 1}, ["norm_topk_prob", "true or false"]),
        ("qwen3_moe", {"model_type": 3}, ["model_type", "string"]),
        ("qwen3_moe", {"num_key_value_heads": 5}, ["num_key_value_heads", "5", "32"]),
        ("qwen3_moe", {"num_experts_per_tok": 129}, ["num_experts_per_tok", "129", "128"]),
        ("qwen3_moe", {"num_local_experts": 64}, ["num_local_experts", "64", "128"]),
        ("qwen3_moe", {"mlp_only_layers": [48]}, ["mlp_only_layers", "48"]),
        ("qwen3_moe", {"mlp_only_layers": ["a"]}, ["mlp_only_layers", "list of integers"]),
        ("qwen3_moe", {"layer_types": ["linear_attention"] * 48}, ["layer_types", "full_attention"]),
        ("qwen3_next", {"layer_types": ["full_attention"]}, ["layer_types", "48 layers"]),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 48}, ["layer_types", "linear_attention"]),
        ("qwen3_next", {"linear_num_value_heads": 20}, ["linear_num_value_heads", "16"]),
        ("qwen3_moe", {"bos_token_id": [1, 2]}, ["bos_token_id", "one integer"]),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, ["shared_expert_intermediate_size", "not known"]),
        ("qwen2_moe", {"use_sliding_window": True}, ["use_sliding_window", "true"]),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}, ["layer_types", "full_attention"]),
        ("qwen3", {"num_experts": 8}, ["num_experts", "not known"]),
        ("qwen3_5_moe_text", {"norm_topk_prob": False}, ["norm_topk_prob", "only true"]),
        ("qwen3_5_moe_text", {"mlp_only_layers": [1]}, ["mlp_only_layers", "leave the list empty"]),
        ("qwen3_5_moe_text", {"attn_output_gate": False}, ["attn_output_gate", "only true"]),
        ("qwen3_5_moe_text", {"mamba_ssm_dtype": "bfloat16"}, ["mamba_ssm_dtype", '"bfloat16"', "float32"]),
        ("qwen3_5_moe_text", {"mtp_use_dedicated_embeddings": True}, ["mtp_use_dedicated_embeddings", "only false"]),
        ("qwen3_5_moe", {"text_config": None}, ["text_config", "must hold"]),
        ("qwen3_5_moe", {"text_config": {"model_type": "llama"}}, ["text_config: model_type", '"llama"']),
        ("qwen3_5_moe", {"text_config": {**RELEASED_3_5_TEXT, "zebra": 1}}, ["text_config: zebra", "not known"]),
        (
            "qwen3_5_moe",
            {"quantization_config": {"quant_method": "awq"}},
            ["quant_method", '"awq"', "use such a checkp"],
        ),
        ("qwen3_5_moe", {"zebra": 1}, ["zebra is 1", "not known"]),
        ("qwen3_moe", {"zebra": 1, "attention_sinks": 4}, ["attention_sinks, zebra", "remove it if it is harmless"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, arch: str, changes: dict[str, object], told: list[str]
) -> None:
    write_config(tmp_path, arch, changes)
    with pytest.raises(ValueError) as caught:
        load_model_config(tmp_path)
    for part in ["config.json", *told]:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["model_type", "hidden_size", "num_experts", "num_key_value_heads", "rope_theta"])
def test_missing_required_field_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"required field {name} is missing"):
        load(tmp_path, drop=(name,))


def test_missing_head_dim_with_heads_that_do_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head_dim must be given"):
        load(tmp_path, drop=("head_dim",), hidden_size=2050)


def test_missing_folder_and_missing_and_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_model_config(tmp_path)
    for text, told in [("{", "is not JSON"), ("[]", "expected a JSON object, found list")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=told):
            load_model_config(tmp_path)


def test_generation_config_gives_defaults_and_its_eos_wins(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3_moe", {})
    assert load_generation_config(tmp_path).eos_token_ids == (151645,)
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [151645, 151643]}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    found = load_generation_config(tmp_path)
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0.6, 0.95, 20, None)
    assert found.eos_token_ids == (151645, 151643)


def test_eos_of_a_multimodal_models_text_config_is_found(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3_5_moe", {})
    assert load_generation_config(tmp_path).eos_token_ids == (248044,)


def test_generation_config_without_sampling_means_greedy(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3_moe", {})
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert load_generation_config(tmp_path).temperature == 0.0


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("top_p", 1.5), ("top_k", "x"), ("min_p", 2)])
def test_generation_config_out_of_range_is_named(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name} is "):
        load_generation_config(tmp_path)
