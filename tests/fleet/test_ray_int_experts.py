"""A fleet whose experts are rounded to int4 when they are loaded, through HTTP and gRPC."""

import io
import json
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from deploy.generate import GenerateOptions, run_generate
from deploy.validation import SamplingInput
from tests.support.ray_fleet import RayFleet

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPT = tuple(range(20, 140))
NEW = 24


def test_tokens_of_two_pools_are_those_of_one_rank_with_the_same_experts(next_checkpoint: Path) -> None:
    out = io.StringIO()
    options = GenerateOptions(
        engine=EngineConfig(model=next_checkpoint, dtype="bfloat16", expert_weights="int4"),
        sampling=SamplingInput(max_tokens=NEW, ignore_eos=True, temperature=0.0),
        prompt_ids=(",".join(map(str, PROMPT)),),
        json=True,
    )
    assert run_generate(options, out) == 0
    expected = json.loads(out.getvalue())["token_ids"]
    room = {"kv_memory": "32MiB", "max_rows": 8}
    pools = {"prefill": {"tp": 2, **room}, "decode": {"tp": 1, **room}}
    with RayFleet(next_checkpoint, pools, lease_s=5.0, dtype="bfloat16", expert_weights="int4") as fleet:
        assert list(fleet.complete(list(PROMPT), max_tokens=NEW, ignore_eos=True).token_ids) == expected
        assert list(fleet.grpc_tokens(PROMPT, NEW)) == expected
