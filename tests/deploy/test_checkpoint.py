import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from deploy.checkpoint import write_random_checkpoint
from router.errors import ConfigError
from shards.families import FAMILIES, load_model_config
from shards.generation_config import load_generation_config

ARCHITECTURES = [name for name, family in FAMILIES.items() if family.published is not None]
PROMPTS = ["Hello world, how are you?", "def main():\n    return 3", "The lazy dog"]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 safe_open is no dict
                found[name] = opened.get_tensor(name)
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(moe_checkpoint: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(moe_checkpoint)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **options: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["per_expert", "fused"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_loads_it_with_nothing_missing_or_left_over(
    make_checkpoint: Callable[..., Path], arch: str, form: str, tied: bool
) -> None:
    folder = make_checkpoint(arch, form=form, max_shard_bytes=1 << 20, tie_word_embeddings=tied)
    _, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_greedy_output_does_not_collapse(make_checkpoint: Callable[..., Path], arch: str, tied: bool) -> None:
    folder = make_checkpoint(arch, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
        assert len(set(tokens.tolist())) >= 40


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path, arch: str) -> None:
    for name, seed in {"a": 7, "b": 7, "c": 8}.items():
        write_random_checkpoint(arch, "tiny", seed, tmp_path / name, max_shard_bytes=1 << 20)
    a, b, c = (folder_bytes(tmp_path / name) for name in "abc")
    assert a == b
    assert [name for name in a if a[name] != c[name]] == [name for name in a if name.endswith(".safetensors")]


def test_fused_experts_hold_the_same_values_as_experts_one_by_one(make_checkpoint: Callable[..., Path]) -> None:
    single = tensors_of(make_checkpoint("qwen3_next"))
    fused = tensors_of(make_checkpoint("qwen3_next", form="fused"))
    prefix = "model.layers.2.mlp.experts"
    gate_up = torch.cat([single[f"{prefix}.5.gate_proj.weight"], single[f"{prefix}.5.up_proj.weight"]])
    assert torch.equal(fused[f"{prefix}.gate_up_proj"][5], gate_up)
    assert torch.equal(fused[f"{prefix}.down_proj"][5], single[f"{prefix}.5.down_proj.weight"])


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(moe_checkpoint: Path) -> None:
    index = json.loads((moe_checkpoint / "model.safetensors.index.json").read_text())
    files = sorted(moe_checkpoint.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < (1 << 20) + 100_000 for file in files)
    assert set(index["weight_map"]) == set(tensors_of(moe_checkpoint))
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_weights_are_bfloat16_unless_asked_otherwise(
    make_checkpoint: Callable[..., Path], moe_checkpoint: Path
) -> None:
    assert {tensor.dtype for tensor in tensors_of(moe_checkpoint).values()} == {torch.bfloat16}
    wide = make_checkpoint("qwen3_moe", dtype="float32")
    assert {tensor.dtype for tensor in tensors_of(wide).values()} == {torch.float32}


def test_qwen3_next_carries_its_multi_token_prediction_layer(next_checkpoint: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(next_checkpoint).items()}
    assert load_model_config(next_checkpoint).num_nextn_predict_layers == 1
    assert shapes["mtp.fc.weight"] == (128, 256)
    for name in ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0.input_layernorm"]:
        assert shapes[f"mtp.{name}.weight"] == (128,)
    assert shapes["mtp.layers.0.self_attn.q_proj.weight"] == (512, 128)
    assert shapes["mtp.layers.0.mlp.experts.15.down_proj.weight"] == (128, 64)


def test_overrides_shape_the_checkpoint(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("qwen3_moe", num_key_value_heads=1, mlp_only_layers=[1], attention_bias=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(folder).items()}
    assert load_model_config(folder).num_key_value_heads == 1
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (64,)
    assert shapes["model.layers.1.mlp.gate_proj.weight"] == (256, 128)


@pytest.mark.slow
@pytest.mark.side_by_side
def test_small_size_is_about_a_tenth_of_a_billion_parameters(tmp_path: Path) -> None:
    write_random_checkpoint("qwen3_next", "small", 0, tmp_path)
    assert 0.08e9 < sum(tensor.numel() for tensor in tensors_of(tmp_path).values()) < 0.13e9


def test_special_tokens_follow_the_vocabulary_in_qwens_order(tokenizer: PreTrainedTokenizerBase) -> None:
    first = len(tokenizer) - 26
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.convert_tokens_to_ids(name) for name in names] == [first, first + 1, first + 2]
    assert tokenizer.convert_tokens_to_ids("<tool_call>") == first + 14
    assert tokenizer.convert_tokens_to_ids("</think>") == first + 25
    assert len(tokenizer) == 2048


def test_configs_name_the_tokenizers_ids(moe_checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    end_of_text, turn_end = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert load_model_config(moe_checkpoint).eos_token_ids == (turn_end,)
    defaults = load_generation_config(moe_checkpoint)
    assert defaults.eos_token_ids == (turn_end, end_of_text)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 0.95)


@pytest.mark.parametrize(
    "text", ["Hello, world! 1234", "na\u00efve \u6f22\u5b57 \U0001f642\n\n\ttab  two", "def f(x):\n    return x"]
)
def test_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_common_words_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer.encode("the class of this function")) <= 6


def test_template_renders_turns_and_opens_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    opened = rendered(tokenizer, messages, add_generation_prompt=True)
    assert opened == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    closed = rendered(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
    assert closed == opened + "<think>\n\n</think>\n\n"


def test_template_reads_content_in_parts(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered(tokenizer, [{"role": "user", "content": parts}]) == "<|im_start|>user\nab<|im_end|>\n"


def test_template_lists_tools_in_the_system_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = rendered(tokenizer, messages, tools=[TOOL])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert text.count("<|im_start|>system") == 1
    assert json.loads(text.split("<tools>\n")[1].split("\n</tools>")[0]) == TOOL


def test_template_renders_calls_and_joins_their_responses_in_one_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}},
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    ]
    messages: list[Any] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "reasoning_content": "Ask.", "tool_calls": calls},
        {"role": "tool", "content": "cold"},
        {"role": "tool", "content": "warm"},
    ]
    assert rendered(tokenizer, messages).split("Weather?<|im_end|>\n")[1] == (
        "<|im_start|>assistant\n<think>\nAsk.\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ncold\n</tool_response>\n<tool_response>\nwarm\n</tool_response><|im_end|>\n"
    )


@pytest.mark.parametrize(
    "old",
    [{"content": "<think>\nlong\n</think>\n\nYes"}, {"content": "Yes", "reasoning": "long"}],
    ids=["in content", "apart"],
)
def test_template_strips_reasoning_of_earlier_answers(
    tokenizer: PreTrainedTokenizerBase, old: dict[str, object]
) -> None:
    messages = [{"role": "user", "content": "A?"}, {"role": "assistant", **old}, {"role": "user", "content": "B?"}]
    text = rendered(tokenizer, messages)
    assert "<|im_start|>assistant\nYes<|im_end|>" in text
    assert "long" not in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arch": "llama"}, "arch is 'llama'; choose one of qwen2_moe, qwen3, qwen3_moe, qwen3_next, qwen3_5_moe_text"),
        ({"size": "huge"}, "size is 'huge'; choose one of tiny, small"),
        ({"form": "sliced"}, "form is 'sliced'"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be at least 1, got 0"),
        ({"overrides": {"num_experts": -3}}, "num_experts is -3"),
        ({"overrides": {"vocab_size": 100}}, "vocab_size 100 is too small"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    arguments: dict[str, Any] = {"arch": "qwen3_moe", "size": "tiny", "seed": 0, "out": tmp_path / "new", **changes}
    with pytest.raises(ConfigError, match=told):
        write_random_checkpoint(**arguments)
    assert not (tmp_path / "new").exists()


def test_folder_with_something_in_it_and_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("x")
    with pytest.raises(ConfigError, match="which is not empty"):
        write_random_checkpoint("qwen3_moe", "tiny", 0, tmp_path)
    with pytest.raises(ConfigError, match="which is a file"):
        write_random_checkpoint("qwen3_moe", "tiny", 0, file)
    assert file.read_text() == "x"
