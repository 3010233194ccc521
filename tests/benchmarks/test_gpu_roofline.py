import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_models import SHAPES, count_weights, write_config
from benchmarks.gpu_roofline import main
from benchmarks.gpu_steps import Cell, count_work
from shards.cache import unit_shape
from shards.families import load_model_config
from shards.mesh import Layout, Place

TINY = ["--device=cpu", "--scale=tiny", "--layers=4", "--repeat=1"]


def test_the_whole_script_runs_on_a_cpu_and_gives_a_line_a_step(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    lines = main([*TINY, "--batch", "1", "3", "--context", "40", "--prefill", "48", f"--json={file}"])
    cells = [("decode", 1, 40), ("decode", 3, 40), ("prefill", 1, 48)]
    expected = [(name, *cell) for name in SHAPES for cell in cells]
    assert [(line.shape, line.cell.kind, line.cell.rows, line.cell.context) for line in lines] == expected
    held = {"qwen3-235b-ep8": 2, "qwen3-235b-16-experts": 2, "qwen3-next-80b": 64}
    for line in lines:
        assert line.layers == 4
        assert 1 <= line.work.hit <= held[line.shape]
        # Which is longer says nothing where others compute while the machine is measured.
        assert line.roofline_ms > 0
        assert line.eager_ms > 0
        assert line.graph_ms is None, "a CPU captures nothing"
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["machine"]["read_gb_s"] > 0
    assert [line["eager_ms"] for line in written["lines"]] == [line.eager_ms for line in lines]


def test_a_machine_without_a_gpu_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main([])
    assert "--device=cuda: torch sees no GPU; use --device cpu --scale tiny" in capsys.readouterr().err


def test_steps_that_do_not_fit_are_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--shape=qwen3-235b-16-experts"
    lines = main([*TINY, shape, "--batch", "16", "--context", "16", "262144", "--prefill", "32"])
    assert [(line.cell.kind, line.cell.context) for line in lines] == [("decode", 16), ("prefill", 32)]
    assert "left out: decode of 16 x 262144 does not fit in" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "billions"), [("qwen3-235b-ep8", 235.094), ("qwen3-next-80b", 79.674)])
def test_shapes_have_the_parameters_of_the_released_models(name: str, billions: float, tmp_path: Path) -> None:
    shape = SHAPES[name]
    write_config(tmp_path, shape.config_fields("full", shape.layers))
    model = load_model_config(tmp_path)
    whole = count_weights(model, Place(layout=Layout(), rank=0), torch.bfloat16)
    assert whole.num_bytes / 2e9 == pytest.approx(billions, abs=0.001)
    own = count_weights(model, Place(layout=shape.layout, rank=0), torch.bfloat16)
    elsewhere = whole.expert * whole.moe_layers * model.num_experts * (shape.layout.ep - 1) // shape.layout.ep
    assert whole.num_bytes - own.num_bytes == 2 * elsewhere


def test_bytes_and_flops_of_a_decode_step_are_those_of_its_shapes(tmp_path: Path) -> None:
    shape = SHAPES["qwen3-235b-16-experts"]
    write_config(tmp_path, shape.config_fields("full", 1))
    model = load_model_config(tmp_path)
    unit = unit_shape(model, 1, block_size=16, dtype=torch.bfloat16, state_dtype=torch.float32)
    weights = count_weights(model, Place(layout=Layout(), rank=0), torch.bfloat16)
    hidden, queries, keys, expert, vocab = 4096, 64 * 128, 4 * 128, 3 * 4096 * 1536, 151936
    matrices = hidden * (2 * queries + 2 * keys) + 16 * hidden
    norms = 3 * hidden + 2 * 128
    work = count_work(model, weights, unit, Cell(kind="decode", rows=2, context=100), [11])
    assert work.read_bytes == 2 * (matrices + norms + vocab * hidden + 11 * expert + 2 * hidden + 2 * 100 * 2 * keys)
    products = 2 * 2 * (matrices + norms + vocab * hidden + 8 * expert)
    assert work.flops == products + 2 * 4 * 100 * queries
    assert work.hit == 11
