import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from cluster.resolve import check_device_memory, resolve_engine, weight_bytes
from cluster.torchrun import check_world, torchrun_place
from router.errors import CheckpointError, ConfigError
from shards.mesh import Layout
from shards.weights import CheckpointReader
from tests.support.int_checkpoint import IntForm, write_ints_and_twin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"state_dtype": "int8"}, "state_dtype must be one of float32, bfloat16, got 'int8'"),
        ({"expert_weights": "int2"}, "expert_weights must be one of checkpoint, int8, int4, got 'int2'"),
        ({"expert_weights": "int8", "device": "cuda"}, "expert_weights=int8 runs on device=cpu with native or torch"),
        (
            {"expert_weights": "int4", "kernels": "triton"},
            "got device=cpu kernels=triton; use those, or expert_weights",
        ),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
        ({"kernels": "fast"}, "kernels must be one of auto, native, torch, triton, got 'fast'"),
        ({"deterministic": "maybe"}, "deterministic must be one of auto, on, off, got 'maybe'"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"kv_memory_bytes": -1}, "kv_memory_bytes must be at least 1, got -1"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"reduction_groups": 3}, "reduction_groups must be a power of two, such as 4, got 3"),
        ({"max_step_tokens": 8}, "max_step_tokens=8 must be at least max_rows=64"),
        ({"kv_transport": "shm"}, "kv_transport must be one of auto, tcp, p2p, nixl, got 'shm'"),
        ({"lease_s": 0.0}, "lease_s must be positive"),
        ({"state_cache_share": 1.0}, "state_cache_share must be between 0 and 1, got 1.0"),
        ({"state_checkpoints": "int4"}, "state_checkpoints must be one of exact, int8, got 'int4'"),
        ({"state_checkpoints": "int8", "prefix_cache": False}, "state_checkpoints=int8 needs prefix_cache"),
        ({"draft_tokens": 9}, "draft_tokens=9: a head drafts 8 tokens a step at most; use 1 to 8"),
        ({"step_timeout_s": -1.0}, "step_timeout_s must be positive seconds, got -1.0"),
        ({"step_timeout_s": math.nan}, "step_timeout_s must be positive seconds, got nan"),
        ({"deterministic": "on", "kernels": "torch"}, "use kernels=native on device=cpu, or deterministic=auto"),
    ],
)
def test_value_that_cannot_work_is_refused_with_name_value_and_remedy(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        EngineConfig(model=Path("m"), **changes)  # pyrefly: ignore[bad-argument-type]


def test_engine_options_are_these_and_no_others() -> None:
    assert set(EngineConfig.__dataclass_fields__) == {
        "model",
        "layout",
        "dtype",
        "state_dtype",
        "expert_weights",
        "device",
        "kernels",
        "deterministic",
        "reduction_groups",
        "block_size",
        "kv_memory_bytes",
        "max_rows",
        "max_step_tokens",
        "chunk_tokens",
        "max_model_len",
        "max_waiting",
        "prefix_cache",
        "state_cache_share",
        "state_checkpoints",
        "draft_tokens",
        "draft_policy",
        "threads",
        "lease_s",
        "kv_transport",
        "step_timeout_s",
    }


def test_resolved_engine_fills_in_what_the_config_leaves_open(moe_checkpoint: Path) -> None:
    engine = resolve_engine(EngineConfig(model=moe_checkpoint, kv_memory_bytes=4 << 20), ranks_here=1)
    assert engine.threads >= 1
    assert engine.num_slots == 0
    assert engine.max_model_len <= engine.num_blocks * 16
    assert engine.scheduler_config().prefix_cache
    assert engine.scheduler_config().chunk_tokens == 2048
    assert engine.rank_config(0, "cpu").num_blocks == engine.num_blocks


def test_model_with_recurrent_state_gets_slots_for_rows_and_for_states_it_keeps(next_checkpoint: Path) -> None:
    plain = EngineConfig(model=next_checkpoint, kv_memory_bytes=64 << 20, max_rows=8, prefix_cache=False)
    assert resolve_engine(plain).num_slots == 8
    engine = resolve_engine(replace(plain, prefix_cache=True))
    assert engine.num_slots > 16
    assert engine.scheduler_config().prefix_cache


def test_states_kept_in_int8_take_memory_of_their_own_at_their_real_size(next_checkpoint: Path) -> None:
    config = EngineConfig(model=next_checkpoint, kv_memory_bytes=64 << 20, max_rows=8)
    exact, int8 = (resolve_engine(replace(config, state_checkpoints=kind)) for kind in ("exact", "int8"))
    assert (exact.num_int8, int8.num_slots) == (0, 8)
    assert int8.num_int8 > 2.5 * (exact.num_slots - 8)
    loads = exact.scheduler_config(), int8.scheduler_config()
    assert loads[0].checkpoint_bytes == loads[0].state_bytes == loads[1].state_bytes > 2 * loads[1].checkpoint_bytes
    assert int8.rank_config(0, "cpu").num_int8 == int8.num_int8


def test_states_in_bfloat16_take_half_the_memory(next_checkpoint: Path) -> None:
    config = EngineConfig(model=next_checkpoint, dtype="float32", kv_memory_bytes=64 << 20, max_rows=8)
    wide, narrow = (resolve_engine(replace(config, state_dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert narrow.num_slots > wide.num_slots
    assert narrow.scheduler_config().state_bytes < 0.7 * wide.scheduler_config().state_bytes
    assert narrow.rank_config(0, "cpu").state_dtype == narrow.kv_layout().state_dtype == "bfloat16"


@pytest.mark.parametrize(("choice", "share"), [("int8", 8.5 / 16), ("int4", 4.5 / 16)])
def test_experts_in_integers_are_planned_with_what_they_take(moe_checkpoint: Path, choice: str, share: float) -> None:
    config = EngineConfig(model=moe_checkpoint)
    rounded = replace(config, expert_weights=choice)  # pyrefly: ignore[bad-argument-type]
    reader = CheckpointReader(moe_checkpoint)
    experts = sum(math.prod(reader.shape(name)) for name in reader.names() if ".experts." in name)
    assert weight_bytes(config) - weight_bytes(rounded) == 2 * experts * (1 - share)
    plain, engine = resolve_engine(config), resolve_engine(rounded)
    assert engine.rank_config(0, "cpu").expert_weights == engine.kv_layout().expert_weights == choice
    assert plain.kv_layout().expert_weights == "checkpoint"


def test_a_checkpoint_of_integers_pairs_by_what_it_holds_and_is_not_rounded_again(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    form = IntForm(form="gptq", bits=4, group=32)
    folder = write_ints_and_twin(make_checkpoint("qwen3_moe"), tmp_path, form)[0]
    config = EngineConfig(model=folder)
    assert resolve_engine(config).kv_layout().expert_weights == "int4"
    assert weight_bytes(config) == weight_bytes(replace(config, expert_weights="int4"))
    with pytest.raises(ConfigError, match="holds integers of 4 bits, which are not rounded again"):
        resolve_engine(replace(config, expert_weights="int8"))


def test_memory_for_no_state_to_keep_is_refused_with_both_remedies(next_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"give at least \d+, or turn prefix_cache off"):
        resolve_engine(EngineConfig(model=next_checkpoint, kv_memory_bytes=1 << 10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": Layout(tp=3)}, "choose a tp that divides"),
        ({"max_model_len": 10**6}, "max_model_len=1000000 exceeds the model's max_position_embeddings"),
        ({"kv_memory_bytes": 1 << 60}, r"--kv-memory\) to at most"),
        ({"kv_memory_bytes": 1000}, "kv_memory_bytes=1000 holds no KV"),
        (
            {"state_dtype": "bfloat16"},
            "state_dtype=bfloat16 needs a model with recurrent state, which qwen3_moe has not",
        ),
        (
            {"expert_weights": "int4", "layout": Layout(tp=4)},
            r"expert_weights=int4: moe_intermediate_size=64 over 4 rank\(s\) gives 16 columns",
        ),
        ({"state_checkpoints": "int8"}, "int8 needs a model with recurrent state, which qwen3_moe has not; use state_"),
        ({"kv_memory_bytes": 1 << 19, "max_model_len": 4096}, "max_model_len=4096 does not fit in kv_memory_bytes"),
    ],
)
def test_engine_that_does_not_fit_model_or_machine_is_refused(
    changes: dict[str, object], message: str, moe_checkpoint: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_engine(EngineConfig(model=moe_checkpoint, **changes))  # pyrefly: ignore[bad-argument-type]


def test_missing_checkpoint_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):
        resolve_engine(EngineConfig(model=tmp_path / "nowhere"))


def test_unsupported_architecture_is_refused_by_name(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    text = (make_checkpoint("qwen3_moe") / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"qwen3_moe"', '"llama"'))
    with pytest.raises(CheckpointError, match="llama"):
        resolve_engine(EngineConfig(model=tmp_path))


def test_process_outside_torchrun_is_told_what_would_do() -> None:
    with pytest.raises(ConfigError, match="RANK is not set: start the ranks with torchrun"):
        torchrun_place({})


def test_torchrun_with_another_number_of_ranks_than_the_layout_is_refused() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    environment = dict(zip(names, ("0", "2", "0", "2", "29500"), strict=True)) | {"MASTER_ADDR": "127.0.0.1"}
    place = torchrun_place(environment)
    check_world(place, Layout(tp=2))
    with pytest.raises(ConfigError, match=r"torchrun started 2 rank\(s\), the layout tp=1 dp=1 has 1"):
        check_world(place, Layout())


def test_weights_that_are_never_loaded_need_no_memory(next_checkpoint: Path) -> None:
    reader = CheckpointReader(next_checkpoint)
    elements = {name: math.prod(reader.shape(name)) for name in reader.names()}
    unused = sum(count for name, count in elements.items() if name.startswith("mtp."))
    assert unused > 0
    config = EngineConfig(model=next_checkpoint, dtype="bfloat16")
    assert weight_bytes(config) == 2 * (sum(elements.values()) - unused)


def test_an_engine_larger_than_a_device_is_refused_by_name(moe_checkpoint: Path) -> None:
    engine = resolve_engine(EngineConfig(model=moe_checkpoint, kv_memory_bytes=8 << 20, max_model_len=64))
    check_device_memory(engine, 1 << 30, where="GPU 1")
    with pytest.raises(ConfigError, match=r"kv_memory_bytes=8388608 does not fit: .*GPU 1 has 9000000 bytes .* lower"):
        check_device_memory(engine, 9_000_000, where="GPU 1")
