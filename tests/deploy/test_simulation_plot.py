"""The plot of a simulation is drawn, or refused before the simulation with what to mend."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.simulation_plot import check_plotting, plot_comparisons
from router.errors import ConfigError
from router.simulate import SimulateOptions, compare


def write_trace(folder: Path) -> Path:
    lines = [
        {"timestamp": 1000 * number, "input_length": 600, "output_length": 9, "hash_ids": [number]}
        for number in range(20)
    ]
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in lines))
    return path


def test_a_plot_is_drawn_beside_the_tables(tmp_path: Path) -> None:
    trace, picture = write_trace(tmp_path), tmp_path / "found.svg"
    flags = ["--members", "1", "--members", "2", "--policy", "cost", "--policy", "least-load"]
    ran = CliRunner().invoke(app, ["simulate", "--trace", str(trace), *flags, "--plot", str(picture)])
    assert ran.exit_code == 0, ran.output
    assert "2 members" in ran.output
    assert picture.read_text().startswith("<?xml")


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_simulation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end with one of \.png"):
        check_plotting(tmp_path / "plot.txt")
    with pytest.raises(ConfigError, match="is no folder"):
        check_plotting(tmp_path / "none" / "plot.png")


def test_a_plot_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "plot.png").mkdir()
    found = list(compare(SimulateOptions(trace=write_trace(tmp_path), policies=("cost",))))
    with pytest.raises(ConfigError, match="cannot be written"):
        plot_comparisons(found, tmp_path / "plot.png")
