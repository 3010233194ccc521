"""Fixtures that every folder's tests share: small random checkpoints, made once a session."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before transformers is imported anywhere: tests never ask a network.
os.environ["HF_HUB_OFFLINE"] = "1"

from deploy.checkpoint import Size, WeightDtype, write_random_checkpoint
from deploy.checkpoint_tensors import ExpertForm
from shards.config_fields import Json


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What asynchronous tests run on."""
    return "asyncio"


@pytest.fixture(scope="session")
async def event_loop_of_all(anyio_backend: str) -> None:
    """One event loop for every test: gRPC's poller of a process hands late events to loops of tests gone by.

    With a loop for each test such an event raises "Event loop is closed" in whichever test runs then.
    """


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give every asynchronous test the one event loop."""
    if isinstance(item, pytest.Function) and item.get_closest_marker("anyio"):
        item.fixturenames.insert(0, "event_loop_of_all")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a random checkpoint and gives its folder; equal arguments give the same, read-only folder.

    Called as make_checkpoint("qwen3_moe", size=, seed=, form=, dtype=, max_shard_bytes=, **fields of config.json).
    """
    made: dict[str, Path] = {}

    def make(
        arch: str,
        *,
        size: Size = "tiny",
        seed: int = 0,
        form: ExpertForm = "per_expert",
        dtype: WeightDtype = "bfloat16",
        max_shard_bytes: int = 1 << 30,
        **overrides: Json,
    ) -> Path:
        key = repr((arch, size, seed, form, dtype, max_shard_bytes, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{arch}-{size}")
            write_random_checkpoint(
                arch, size, seed, folder, overrides=overrides, form=form, dtype=dtype, max_shard_bytes=max_shard_bytes
            )
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def moe_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny Qwen3-MoE checkpoint, in several safetensors files."""
    return make_checkpoint("qwen3_moe", max_shard_bytes=1 << 20)


@pytest.fixture(scope="session")
def next_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny Qwen3-Next checkpoint, in several safetensors files."""
    return make_checkpoint("qwen3_next", max_shard_bytes=1 << 20)
