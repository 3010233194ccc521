"""Config fields that change the function, each by itself, against transformers in float32."""

from pathlib import Path

import pytest

from shards.mesh import Layout
from tests.support.exactness import Reference
from tests.support.exactness_matrix import ARCHITECTURES, FEW_CASES, NEXT_VARIETY, VARIETY, check_rows, run_matrix
from tests.support.reference import make_reference


@pytest.mark.parametrize("variety", VARIETY)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_field_means_here_what_it_means_in_transformers(architecture: str, variety: str, tmp_path: Path) -> None:
    reference = Reference.of(make_reference(tmp_path, architecture, VARIETY[variety]))
    rows, _ = run_matrix(f"{architecture}, {variety}", tmp_path, reference, Layout(), FEW_CASES)
    check_rows(rows)


# transformers makes the parameters of an expert of no width, and torch warns of that.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@pytest.mark.parametrize("variety", NEXT_VARIETY)
def test_config_field_of_qwen3_next_means_here_what_it_means_in_transformers(variety: str, tmp_path: Path) -> None:
    reference = Reference.of(make_reference(tmp_path, "qwen3_next", NEXT_VARIETY[variety]))
    rows, _ = run_matrix(f"qwen3_next, {variety}", tmp_path, reference, Layout(), FEW_CASES)
    check_rows(rows)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2, ep=2)])
@pytest.mark.parametrize("variety", ["6 heads, 2 kv heads", "dense layers (mlp_only_layers)", "tied embeddings"])
def test_config_field_means_the_same_on_two_ranks(variety: str, layout: Layout, tmp_path: Path) -> None:
    reference = Reference.of(make_reference(tmp_path, "qwen3_moe", VARIETY[variety]))
    rows, _ = run_matrix(f"qwen3_moe, {variety}", tmp_path, reference, layout, FEW_CASES)
    check_rows(rows)
