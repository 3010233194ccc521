import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from shards.batch import LogprobColumns, RowSampling
from shards.rank import KernelsName
from tests.support.reference import make_reference, reference_logits
from tests.support.stepping import Work, needs_native, run, tokens_of

LOGPROB_TOLERANCE = 2e-4
"""Measured: at most 9e-5, of which transformers' own float32 error is 7e-5 (the tied shape, whose logits reach 15);
below 2e-5 for all others."""
TIE_MARGIN = 1e-3
KERNELS = ["torch", pytest.param("native", marks=needs_native)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "moe": ("qwen3_moe", {}),
    "moe 6 heads of 20, 2 kv": ("qwen3_moe", {"num_attention_heads": 6, "head_dim": 20}),
    "moe dense layers mixed in": ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 2}),
    "moe tied, unnormalised gate": ("qwen3_moe", {"tie_word_embeddings": True, "norm_topk_prob": False}),
    "moe attention bias": ("qwen3_moe", {"attention_bias": True}),
    "moe YaRN": ("qwen3_moe", {"rope_parameters": YARN}),
    "dense": ("qwen3", {"tie_word_embeddings": True}),
    "2 moe": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "3.5 moe": ("qwen3_5_moe_text", {}),
    "next": ("qwen3_next", {}),
    "next 6 heads, 3 kv, 3 key heads": (
        "qwen3_next",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "linear_num_key_heads": 3, "linear_num_value_heads": 3},
    ),
    "next 4 value heads a key head, wide conv": (
        "qwen3_next",
        {"linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_conv_kernel_dim": 6},
    ),
    "next tied, dense layer, attention first": (
        "qwen3_next",
        {
            "tie_word_embeddings": True,
            "mlp_only_layers": [2],
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "linear_attention"],
        },
    ),
    "next YaRN on half of the head": ("qwen3_next", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}),
    "next attention bias": ("qwen3_next", {"attention_bias": True}),
}


def make_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 131, (n,), generator=generator).tolist() for n in lengths]


def whole_rows(columns: LogprobColumns) -> Tensor:
    """Columns that report the whole vocabulary -> log probabilities [N, V]."""
    ids, values = torch.tensor(columns.top_ids_NK), torch.tensor(columns.top_logprobs_NK)
    return torch.zeros(ids.shape).scatter_(1, ids, values)


def worst_margin(model: PreTrainedModel, prompt: list[int], output: list[int]) -> float:
    """How far below the reference's best logit a chosen token lies, over a greedy output; 0.0 where all agree."""
    logits = reference_logits(model, prompt + output)[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output).unsqueeze(1)).squeeze(1)
    return float((logits.max(dim=1).values - chosen).max())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_prompt_positions_log_probabilities_are_those_of_transformers(
    shape: str, kernels: KernelsName, tmp_path: Path
) -> None:
    architecture, changes = SHAPES[shape]
    model = make_reference(tmp_path, architecture, changes)
    prompts = make_prompts((37, 5, 1, 100))
    everything = RowSampling(temperature=0.0, prompt_logprobs=131)
    # One token more, so that every position of the prompt has a next one.
    work = Work(prompts=[[*prompt, 0] for prompt in prompts], samplings=[everything] * 4, chunk=64)

    steps = run(tmp_path, work, kernels=kernels)[0]

    for row, prompt in enumerate(prompts):
        ours = torch.cat([whole_rows(step.prompt_logprobs[row]) for step in steps if row in step.prompt_logprobs])
        expected = torch.log_softmax(reference_logits(model, prompt), dim=-1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", ["moe", "moe YaRN", "next", "next tied, dense layer, attention first"])
def test_greedy_output_is_that_of_transformers_but_for_ties(shape: str, kernels: KernelsName, tmp_path: Path) -> None:
    architecture, changes = SHAPES[shape]
    model = make_reference(tmp_path, architecture, changes, seed=1)
    prompts = make_prompts((1, 3, 9, 16, 17, 33, 64, 80), seed=1)

    outputs = tokens_of(run(tmp_path, Work(prompts=prompts, new_tokens=64), kernels=kernels), len(prompts))

    margins = [worst_margin(model, *pair) for pair in zip(prompts, outputs, strict=True)]
    differences = [margin for margin in margins if margin > 0]
    sys.stdout.write(f"{shape}: margins where the reference prefers another token: {differences}\n")
    assert max(margins) < TIE_MARGIN
    assert len(differences) <= 1
    assert all(len(set(output)) > 8 for output in outputs)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_through_the_cache_and_a_batch_give_what_the_whole_prompt_alone_gives(
    architecture: str, chunk: int, tmp_path: Path
) -> None:
    make_reference(tmp_path, architecture, seed=2)
    prompts = make_prompts((70, 2, 31), seed=2)
    alone = [tokens_of(run(tmp_path, Work(prompts=[prompt], new_tokens=12)), 1)[0] for prompt in prompts]

    together = tokens_of(run(tmp_path, Work(prompts=prompts, new_tokens=12, chunk=chunk)), 3)

    assert together == alone


def test_text_half_of_a_multimodal_checkpoint_gives_the_tokens_of_the_text_checkpoint(tmp_path: Path) -> None:
    text, whole = tmp_path / "text", tmp_path / "whole"
    make_reference(text, "qwen3_5_moe_text")
    whole.mkdir()
    tensors = load_file(text / "model.safetensors")
    nested = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(nested | {"model.visual.patch_embed.proj.weight": torch.zeros(2)}, whole / "model.safetensors")
    config = json.loads((text / "config.json").read_text())
    around = {"model_type": "qwen3_5_moe", "text_config": config, "vision_config": {"depth": 1}, "image_token_id": 1}
    (whole / "config.json").write_text(json.dumps(around))
    work = Work(prompts=make_prompts((9, 30)), new_tokens=12)
    assert tokens_of(run(whole, work), 2) == tokens_of(run(text, work), 2)
