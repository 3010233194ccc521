"""Experts held as integers: the same on every rank, plain ones never all in memory, refused where they cannot be."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.config import Bits, ModelConfig, PackedWeights
from shards.cuts import make_cuts
from shards.families import load_model_config
from shards.int_experts import ExpertChoice, check_int_experts, expert_bits, load_int_experts
from shards.int_weights import IntWeights, round_rows, strips_of
from shards.mesh import Layout, Place
from shards.weights import CheckpointReader
from tests.support.int_checkpoint import IntForm, write_ints_and_twin
from tests.support.source_tree import ROOT

PREFIX = "model.layers.0.mlp.experts"
WIDE = {"moe_intermediate_size": 128}


def held(folder: Path, place: Place, bits: Bits = 4) -> tuple[ModelConfig, range, range, IntWeights, IntWeights]:
    """Which experts and columns a rank holds, and what it loads of them."""
    model = load_model_config(folder)
    cuts = make_cuts(model, place, deterministic=True)
    reader = CheckpointReader(folder, config=model)
    gate_up, down = load_int_experts(reader, PREFIX, model, cuts, bits)
    return model, cuts.experts, cuts.expert_columns, gate_up, down


@pytest.fixture(params=["per_expert", "fused", "gptq", "pack-quantized"])
def folder(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    if request.param in ("per_expert", "fused"):
        return make_checkpoint("qwen3_moe", form=request.param, **WIDE)
    form = IntForm(form=request.param, bits=4, group=128)
    return write_ints_and_twin(make_checkpoint("qwen3_moe", **WIDE), tmp_path, form)[0]


def test_rounded_groups_are_cut_too_and_stay_the_same_numbers(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("qwen3_moe")
    _, _, columns, _, down = held(folder, Place(layout=Layout(), rank=0))
    # Four parts of 16 columns.
    assert (len(columns), down.group) == (64, 16)
    weight = CheckpointReader(folder).read(f"{PREFIX}.3.down_proj.weight", dtype=torch.float32)
    rows = round_rows(weight, 4)
    meant = rows.values_NK.float() * rows.scales_NG.float().repeat_interleave(32, dim=1)
    assert torch.equal(down.widened(3, len(weight)), meant)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=4), Layout(tp=2, dp=2, ep=4)], ids=str)
def test_every_rank_holds_its_part_of_the_same_integers(folder: Path, layout: Layout) -> None:
    _, _, columns, gate_up, down = held(folder, Place(layout=Layout(), rank=0))
    width = len(columns)
    for rank in range(layout.world):
        model, experts, mine, some_gate_up, some_down = held(folder, Place(layout=layout, rank=rank))
        for place, expert in enumerate(experts):
            part = slice(mine.start, mine.stop)
            for half in range(2):
                found = some_gate_up.widened(place, len(mine), half * strips_of(len(mine)))
                assert torch.equal(found, gate_up.widened(expert, width, half * strips_of(width))[part])
            found = some_down.widened(place, model.hidden_size)
            assert torch.equal(found, down.widened(expert, model.hidden_size)[:, part])


def test_groups_are_cut_where_a_part_of_the_sum_ends(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = make_checkpoint("qwen3_moe", moe_intermediate_size=192)
    form = IntForm(form="gptq", bits=8, group=64)
    folder = write_ints_and_twin(plain, tmp_path, form)[0]
    _, _, _, gate_up, down = held(folder, Place(layout=Layout(), rank=0), 8)
    # Four parts of 48 columns.
    assert (gate_up.group, down.group) == (64, 16)
    assert gate_up.scales.dtype == torch.float16


def test_scales_of_several_dtypes_in_a_layer_are_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    form = IntForm(form="pack-quantized", bits=8, group=32)
    folder = write_ints_and_twin(make_checkpoint("qwen3_moe"), tmp_path, form)[0]
    tensors = load_file(folder / "model.safetensors")
    name = f"{PREFIX}.3.up_proj.weight_scale"
    save_file(tensors | {name: tensors[name].float()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"scales of some experts are torch\.bfloat16, of others torch\.float32"):
        held(folder, Place(layout=Layout(), rank=0), 8)


PEAK = """
import sys
from pathlib import Path
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import Rank, RankConfig
place = Place(layout=Layout(), rank=0)
common = dict(dtype="bfloat16", num_blocks=4, num_slots=1, max_rows=1, max_model_len=32, kernels="torch")
rank = Rank(RankConfig(model=Path(sys.argv[1]), place=place, expert_weights=sys.argv[2], **common), Comms.local())
def of(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
# What importing took at its peak is forgotten.
Path("/proc/self/clear_refs").write_text("5")
before = of("VmRSS")
rank.load()
print(of("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_plain_weights_are_never_all_in_memory(make_checkpoint: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 1024, "num_experts": 128, "num_hidden_layers": 1}
    folder = make_checkpoint("qwen3_moe", **sizes)
    plain_kb = 2 * 3 * 256 * 1024 * 128 // 1024
    peaks: dict[str, int] = {}
    for choice in ("checkpoint", "int4"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder), choice], capture_output=True, text=True, check=True, cwd=ROOT
        )
        peaks[choice] = int(done.stdout)
    assert peaks["checkpoint"] > 0.9 * plain_kb
    # A quarter stays; some experts at a time are on their way.
    assert peaks["int4"] < 0.6 * plain_kb


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> ModelConfig:
    return load_model_config(make_checkpoint("qwen3_moe"))


def packed(model: ModelConfig, bits: Bits, group: int = 32) -> ModelConfig:
    return replace(model, packed_weights=PackedWeights(form="gptq", bits=bits, group_size=group))


def test_the_choice_and_the_checkpoint_decide_on_the_bits(model: ModelConfig) -> None:
    assert [expert_bits(model, choice) for choice in ("checkpoint", "int8", "int4")] == [None, 8, 4]
    assert [expert_bits(packed(model, 4), choice) for choice in ("checkpoint", "int4")] == [4, 4]
    with pytest.raises(ValueError, match="expert_weights=int8: the checkpoint holds integers of 4 bits"):
        expert_bits(packed(model, 4), "int8")


@pytest.mark.parametrize(
    ("layout", "choice", "where", "told"),
    [
        (Layout(tp=4), "int4", {}, r"moe_intermediate_size=64 over 4 rank\(s\) gives 16 columns, which must be a mult"),
        (Layout(), "int8", {"device": "cuda:0"}, r"expert_weights=int8 \(int8\) runs on device cpu .* device=cuda:0"),
        (Layout(), "int8", {"kernels": "triton"}, r"got device=cpu kernels=triton; use those, or"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    model: ModelConfig, layout: Layout, choice: ExpertChoice, where: dict[str, str], told: str
) -> None:
    device, kernels = where.get("device", "cpu"), where.get("kernels", "native")
    with pytest.raises(ValueError, match=told):
        check_int_experts(model, layout, choice, device=device, kernels=kernels, deterministic=True)
    check_int_experts(model, layout, "checkpoint", device=device, kernels=kernels, deterministic=True)


def test_integers_of_a_checkpoint_are_refused_where_parts_of_sums_are_too_narrow(model: ModelConfig) -> None:
    narrow = replace(packed(model, 4), moe_intermediate_size=48)
    check_int_experts(packed(model, 4), Layout(tp=4), "checkpoint", device="cpu", kernels="native", deterministic=True)
    with pytest.raises(ValueError, match=r"int4\): moe_intermediate_size=48 .* sums of 12 columns, .* multiple of 8"):
        check_int_experts(narrow, Layout(), "checkpoint", device="cpu", kernels="native", deterministic=True)
    with pytest.raises(ValueError, match="int4\\) runs on device cpu"):
        check_int_experts(packed(model, 4), Layout(), "checkpoint", device="cuda", kernels="x", deterministic=True)


def test_a_model_without_experts_has_none_to_round(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="expert_weights=int4: the model has no experts; use expert_weights=checkp"):
        expert_bits(load_model_config(make_checkpoint("qwen3")), "int4")
