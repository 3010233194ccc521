import shutil
import socket
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from deploy.config import (
    PoolConfig,
    PoolsConfig,
    ServeConfig,
    config_keys,
    config_mapping,
    engine_config,
    parse_config,
)
from deploy.config_check import check_config
from deploy.config_file import load_config_file
from deploy.config_keys import read_api_keys
from router.errors import CheckpointError, ConfigError
from shards.mesh import Layout
from tests.support.ports import free_port

MIXED: Final = {"mixed": {"members": 1}}


def make_config(model: str = "model", **keys: Mapping[str, object]) -> ServeConfig:
    return parse_config({"model": model, "http": {"port": free_port()}, "grpc": {"port": free_port()}} | keys)


def test_a_model_alone_is_served_by_a_prefill_and_a_decode_pool_of_one_member() -> None:
    config = parse_config({"model": "dir/name"})

    assert config.served_name == "name"
    assert config.pools.roles == (("prefill", PoolConfig()), ("decode", PoolConfig()))


def test_plain_values_of_a_config_give_the_same_config_back() -> None:
    config = make_config(
        pools={"mixed": {"members": 2, "max_members": 3, "tp": 2, "dp": 2, "ep": 4, "kv_memory": "1.5 GiB"}},
        engine={"max_model_len": 100, "deterministic": "off"},
    )

    assert parse_config(config_mapping(config)) == config


def test_a_pool_s_options_reach_its_engines() -> None:
    config = make_config(
        pools={"prefill": {"tp": 2, "kv_memory": "1MiB", "threads": 3}, "decode": {"dp": 2, "chunk_tokens": 7}},
        engine={"dtype": "float32", "max_model_len": 50, "prefix_cache": False, "expert_weights": "int4"},
    )

    prefill, decode = engine_config(config, "prefill"), engine_config(config, "decode")

    assert (prefill.layout, prefill.kv_memory_bytes, prefill.threads) == (Layout(tp=2), 1 << 20, 3)
    assert (decode.layout, decode.chunk_tokens) == (Layout(dp=2), 7)
    assert (decode.dtype, decode.max_model_len, decode.prefix_cache) == ("float32", 50, False)
    assert decode.expert_weights == "int4"


def test_a_pool_that_is_not_configured_has_no_engine() -> None:
    with pytest.raises(ConfigError, match=r"pools\.decode: is not configured; pools are mixed"):
        engine_config(make_config(pools=MIXED), "decode")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, r"model: is required"),
        ({"model": "m", "engin": {}}, r"engin: unknown key; did you mean engine\?"),
        (
            {"model": "m", "pools": {"mixed": {"member": 2}}},
            r"pools\.mixed\.member: unknown key; did you mean members\?",
        ),
        ({"model": "m", "ray": {"zzz": 1}}, r"ray\.zzz: unknown key; known here: address, num_cpus"),
        ({"model": "m", "ray": {"object_store_bytes": "1MiB"}}, r"ray\.object_store_bytes: must .* 78643200, got"),
        ({"model": "m", "pools": {"mixed": {"members": "2"}}}, r"pools\.mixed\.members: must be .* integer, got '2'"),
        ({"model": "m", "pools": {"mixed": {"members": True}}}, r"pools\.mixed\.members: must be .* integer, got True"),
        ({"model": "m", "pools": {"mixed": {"tp": 0}}}, r"pools\.mixed\.tp: must be greater .* to 1, got 0"),
        ({"model": "m", "pools": {"mixed": {"kv_memory": "2zb"}}}, r"pools\.mixed\.kv_memory: .* such as 256MiB .*2zb"),
        ({"model": "m", "pools": {"mixed": {"tp": 2, "ep": 3}}}, r"pools\.mixed: ep=3 .* must be 1 or tp x dp = 2"),
        (
            {"model": "m", "pools": {"mixed": {"members": 3, "max_members": 1}}},
            r"pools\.mixed: max_members=1 is below members=3; raise",
        ),
        ({"model": "m", "pools": {"prefill": {}}}, r"pools: got prefill; give prefill and decode, or mixed alone"),
        ({"model": "m", "pools": {}}, r"pools: got no pool; give"),
        ({"model": "m", "engine": {"dtype": "fp8"}}, r"engine\.dtype: must be 'float32' or 'bfloat16', got 'fp8'"),
        (
            {"model": "m", "engine": {"expert_weights": "fp4"}},
            r"engine\.expert_weights: must be 'checkpoint', 'int8' or 'int4', got 'fp4'",
        ),
        ({"model": "m", "engine": 3}, r"engine: must be a dictionary .*, got 3"),
        ({"model": "m", "http": {"port": 70000}}, r"http\.port: must be less than or equal to 65535, got 70000"),
        ({"model": "m", "grpc": {"tls_key": "k"}}, r"grpc: tls_certificate and tls_key go together"),
        ({"model": "m", "grpc": {"tls_client_ca": "k"}}, r"grpc: tls_client_ca needs tls_certificate"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_remedy(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(mapping)


def test_a_queue_longer_than_all_requests_in_flight_is_refused_for_it_would_have_no_effect() -> None:
    with pytest.raises(ConfigError, match="max_queue=9 counts within max_in_flight=5"):
        make_config("m", gateway={"max_in_flight": 5, "max_queue": 9})


def test_all_mistakes_of_a_config_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": "m", "http": {"port": 0, "hots": "x"}})

    assert "http.port" in str(caught.value)
    assert "did you mean host?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x\npools: [1, 2\n", "line 3: expected ',' or ']'"),
        ("- model\n", r"must hold keys such as `model: DIR`, got \['model'\]"),
        ("", "must hold keys"),
        ("model: \x01\n", "mend the YAML"),
        ("model: x\nengine: {dtype: float32}\nengine: {block_size: 32}\n", "line 3: engine comes a second time"),
        ("model: !!map foo\n", "mend the YAML"),
        ("model: !!set foo\n", "mend the YAML"),
        ("? [1, 2]\n: 3\n", "mend the YAML"),
        ("model: x\nhttp:\n  port: 1\n  port: 2\n", "line 4: port comes a second time"),
    ],
)
def test_a_config_file_that_is_no_yaml_mapping_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=message) as caught:
        load_config_file(path)

    assert str(path) in str(caught.value)


def test_a_config_file_holds_the_keys_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("model: m\npools:\n  mixed: {members: 2}\n")

    config = parse_config(load_config_file(path))

    assert config.pools == PoolsConfig(mixed=PoolConfig(members=2))


def test_keys_of_a_merge_may_come_again(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("a: &a {k: 1}\nd: {b: &b {<<: *a, k: 2}}\nc: {<<: *b}\n")

    assert load_config_file(path)["c"] == {"k": 2}


def test_a_config_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read.*; name a YAML file"):
        load_config_file(tmp_path / "none.yaml")


def test_every_key_has_a_default_but_the_model() -> None:
    keys = config_keys()

    assert keys["pools.decode.kv_memory"] == 256 << 20
    assert keys["http.port"] == 8000
    assert keys["model"] is None


def test_a_fleet_that_fits_this_machine_passes_the_check(next_checkpoint: Path) -> None:
    check_config(make_config(str(next_checkpoint), pools={"prefill": {"tp": 2}, "decode": {}}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pools": {"mixed": {"tp": 3}}}, r"pools\.mixed: tp=3 .* choose a tp"),
        ({"pools": {"mixed": {"tp": 3}}, "ray": {"address": "auto"}}, r"pools\.mixed: tp=3 .* choose a tp"),
        (
            {"engine": {"expert_weights": "int4"}, "pools": {"mixed": {"tp": 4}}},
            r"pools\.mixed: expert_weights=int4: moe_intermediate_size=\d+ over 4 rank",
        ),
        (
            {"engine": {"expert_weights": "int4"}, "pools": {"mixed": {"tp": 4}}, "ray": {"address": "auto"}},
            r"pools\.mixed: expert_weights=int4: moe_intermediate_size=\d+ over 4 rank",
        ),
        ({"pools": {"mixed": {"max_rows": 4000}}}, r"pools\.mixed: max_step_tokens=2048 must be at least max_rows"),
        ({"pools": {"mixed": {"kv_memory": "900TiB"}}}, r"pools\.mixed: kv_memory_bytes=.*lower kv_memory_bytes"),
        ({"pools": {"mixed": {"members": 10**7}}}, r"pools: KV memory and weights of all members .*; lower kv_memory"),
        ({"http": {"host": "0.0.0.0"}}, r"http\.host: 0\.0\.0\.0 .* no keys; name a file of keys"),
        ({"grpc": {"host": "fleet.example"}}, r"grpc\.host: fleet\.example .* no keys"),
        ({"http": {"port": 9000}, "grpc": {"port": 9000}}, r"grpc\.port: 9000 is http\.port too"),
        ({"http": {"api_keys_file": "/none"}}, r"http\.api_keys_file: /none cannot be read"),
        (
            {"grpc": {"tls_certificate": "/none", "tls_key": "/none"}},
            r"grpc\.tls_certificate: there is no file /none",
        ),
    ],
)
def test_a_fleet_that_cannot_run_is_refused_before_anything_starts(
    next_checkpoint: Path, keys: dict[str, Mapping[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(make_config(str(next_checkpoint), **keys))


def test_several_gateways_on_a_local_cluster_are_refused_for_they_share_a_grpc_port(next_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"gateway.replicas=2 with ray.address=local"):
        check_config(make_config(str(next_checkpoint), gateway={"replicas": 2}))


def test_a_checkpoint_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        check_config(make_config(str(tmp_path / "none")))


def test_a_checkpoint_without_a_tokenizer_is_refused_before_anything_starts(
    next_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(next_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))

    with pytest.raises(CheckpointError, match=r"model/tokenizer\.json: missing"):
        check_config(make_config(str(tmp_path / "model")))


@pytest.mark.parametrize("seen", [0, 2])
def test_ranks_without_a_gpu_each_are_refused(
    next_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, seen: int
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    config = make_config(str(next_checkpoint), engine={"device": "cuda"}, pools={"mixed": {"tp": 2, "members": 2}})

    with pytest.raises(ConfigError, match=rf"engine\.device: cuda .* 4 ranks .* torch sees {seen} here; use cpu"):
        check_config(config)


def test_a_checkpoint_that_only_other_nodes_have_is_left_to_them(tmp_path: Path) -> None:
    check_config(make_config(str(tmp_path / "none"), ray={"address": "10.0.0.1:6379"}))


def test_a_port_in_use_is_refused_by_its_key(next_checkpoint: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(ConfigError, match=rf"grpc\.port: {port} on 127\.0\.0\.1 is in use; .* \(--grpc-port\)"):
            check_config(make_config(str(next_checkpoint), grpc={"port": port}))


def test_an_address_of_another_machine_is_refused(next_checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")

    with pytest.raises(ConfigError, match=r"http: 192\.0\.2\.1:\d+ cannot be bound"):
        check_config(
            make_config(
                str(next_checkpoint), http={"host": "192.0.2.1", "port": free_port(), "api_keys_file": str(keys)}
            )
        )


def test_keys_may_have_tenants_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n# bought in May\ntwo#2 acme\n")

    assert [(key.key, key.tenant) for key in read_api_keys(path)] == [("one", "key-2"), ("two#2", "acme")]


@pytest.mark.parametrize(("text", "message"), [("a b c-secret\n", "line 1: expected KEY"), ("# none\n", "no key")])
def test_a_broken_key_file_is_told_without_a_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)

    with pytest.raises(ConfigError, match=message) as caught:
        read_api_keys(path)

    assert "secret" not in str(caught.value)
