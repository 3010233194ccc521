"""Config fields that change the function, each by itself, against transformers in float32."""

from pathlib import Path

import pytest

from shards.mesh import Layout
from tests.support.exactness import Reference
from tests.support.exactness_matrix import ARCHITECTURES, FEW_CASES, check_rows, run_matrix, varieties
from tests.support.reference import make_reference


# transformers makes the parameters of an expert of no width, and torch warns of that.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@pytest.mark.parametrize(
    ("architecture", "variety"), [(name, variety) for name in ARCHITECTURES for variety in varieties(name)]
)
def test_config_field_means_here_what_it_means_in_transformers(architecture: str, variety: str, tmp_path: Path) -> None:
    reference = Reference.of(make_reference(tmp_path, architecture, varieties(architecture)[variety]))
    rows, _ = run_matrix(f"{architecture}, {variety}", tmp_path, reference, Layout(), FEW_CASES)
    check_rows(rows)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2, ep=2)])
@pytest.mark.parametrize("variety", ["6 heads, 2 kv heads", "dense layers (mlp_only_layers)", "tied embeddings"])
def test_config_field_means_the_same_on_two_ranks(variety: str, layout: Layout, tmp_path: Path) -> None:
    reference = Reference.of(make_reference(tmp_path, "qwen3_moe", varieties("qwen3_moe")[variety]))
    rows, _ = run_matrix(f"qwen3_moe, {variety}", tmp_path, reference, layout, FEW_CASES)
    check_rows(rows)
