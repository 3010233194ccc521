"""`moefleet serve`: what it prints, and, on a real Ray cluster, that it starts, serves, refuses and ends."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from cluster.directory import MemberStatus, RankStatus
from cluster.members import MemberInfo
from deploy.cli_fleet import failure_reason, no_gateway
from deploy.config import ServeConfig, parse_config
from deploy.serve_command import (
    StopSignals,
    call_line,
    connect_environment,
    curl_line,
    program,
    ray_environment,
    welcome,
)
from router.request import MemberId
from tests.support.ports import free_port
from tests.support.source_tree import ROOT

START_S = 200.0
STOP_S = 60.0


def make_config(**keys: object) -> ServeConfig:
    return parse_config({"model": "/models/it's", "model_name": "m"} | keys)


def make_status() -> MemberStatus:
    return MemberStatus(
        info=MemberInfo(member_id=MemberId("decode-1"), role="decode", address="127.0.0.1:4000"),
        ranks=(RankStatus(rank=0, pid=11, node="n", state="up"), RankStatus(rank=1, pid=12, node="n", state="up")),
        tp=2,
        dp=1,
        ep=1,
        max_model_len=100,
        since_unix_s=0.0,
    )


def test_a_gateway_that_cannot_be_reached_is_told_of_with_where_it_listens() -> None:
    local = no_gateway(make_config(), ["127.0.0.1:8000"])
    assert local == "no gateway answers at http://127.0.0.1:8000/health; see Serve's logs"
    head = no_gateway(make_config(ray={"address": "10.0.0.1:6379"}), ["127.0.0.1:8000"])
    assert "listen on the head node, and http.host=127.0.0.1 must be" in head
    several = make_config(ray={"address": "auto"}, gateway={"replicas": 2}, http={"host": "10.0.0.7"})
    assert "listen on 2 nodes of the cluster, and http.host=10.0.0.7" in no_gateway(
        several, ["10.0.0.7:8000", "x:8000"]
    )


def test_the_welcome_tells_members_urls_and_lines_to_call() -> None:
    config = make_config(http={"host": "0.0.0.0", "port": 81}, grpc={"port": 91})

    text = welcome(config, [make_status()], program="moefleet")

    assert re.search(r"decode +decode-1 +tp 2 dp 1 ep 1 +rank pids 11, 12", text)
    assert "http://127.0.0.1:81/v1" in text
    assert curl_line(config) in text
    assert "moefleet call --target 127.0.0.1:91 --message Hello" in text


def test_the_curl_line_posts_json_whatever_the_model_is_called() -> None:
    words = shlex.split(curl_line(make_config(model_name="it's")))

    assert words[0] == "curl"
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's"


def test_lines_for_a_fleet_with_keys_read_the_first_one_and_show_none(tmp_path: Path) -> None:
    keys = tmp_path / "my keys"
    keys.write_text("# ours\nsecret acme\nother\n")
    config = make_config(http={"api_keys_file": str(keys)})

    header = subprocess.run(
        curl_line(config).replace("curl", "printf '%s\\n'", 1), shell=True, capture_output=True, text=True, check=True
    ).stdout

    assert "Authorization: Bearer secret\n" in header
    assert "secret" not in curl_line(config) + call_line(config, "moefleet")
    assert shlex.split(call_line(config, "moefleet"))[-2:] == ["--api-key-file", str(keys)]


def test_a_fleet_with_tls_is_called_with_its_certificate() -> None:
    config = make_config(grpc={"tls_certificate": "/c.pem", "tls_key": "/k.pem"})

    assert call_line(config, "moefleet").endswith("--tls-ca-file /c.pem")


def test_an_ipv6_address_is_put_in_brackets() -> None:
    assert "--target '[::1]:9000'" in call_line(make_config(grpc={"host": "::1"}), "moefleet")


@pytest.mark.parametrize(
    ("argument", "command"),
    [("/usr/bin/moefleet", "/usr/bin/moefleet"), ("/x/deploy/cli.py", f"{sys.executable} -m deploy.cli")],
)
def test_printed_lines_name_the_program_that_runs(argument: str, command: str) -> None:
    assert program(argument) == command


def test_only_a_fleet_that_scales_pushes_its_loads_every_second() -> None:
    name = "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"

    assert name not in ray_environment(make_config())
    assert ray_environment(make_config(pools={"mixed": {"max_members": 2}}))[name] == "1"


def test_the_token_of_this_user_s_clusters_is_shown_to_one_named_by_address(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert "RAY_AUTH_MODE" not in connect_environment(token)

    token.touch()

    assert connect_environment(token)["RAY_AUTH_MODE"] == "token"


def test_the_first_signal_interrupts_and_later_ones_do_nothing() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signals = StopSignals()
    try:
        signals.install()
        with pytest.raises(BaseException, match=r"^$") as caught:
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not isinstance(caught.value, Exception)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "The deployment failed to start 1 times in a row. Error:\nray::ServeReplica\n  File x\n"
            "router.errors.ConfigError: tp=3 does not fit; lower tp\n",
            "tp=3 does not fit; lower tp",
        ),
        ("Traceback\nray.exceptions.RayTaskError: x\nKeyError: 'a'\n", "KeyError: 'a'"),
        ("one\n\ntwo\n", "two"),
        ("", "no reason was given"),
    ],
)
def test_a_failure_in_another_process_is_told_in_one_line(text: str, reason: str) -> None:
    assert failure_reason(text) == reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """`moefleet serve` in a session of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, word: str) -> None:
        self.wait_until(lambda: word in self.text())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + START_S
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, self.text()
            time.sleep(0.1)

    def runs(self, program: str) -> bool:
        """Whether it has started one."""
        names: list[str] = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                names += process.cmdline()[:1]
        return any(program in name for name in names)

    def lines(self, word: str) -> list[str]:
        return [line.strip() for line in self.text().splitlines() if word in line]

    def processes(self) -> list[psutil.Process]:
        """Itself, its descendants, and whatever else is of its session."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True), *_session(self.process.pid)]


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@contextmanager
def serving(folder: Path, model: Path, *flags: str) -> Iterator[Served]:
    """`moefleet serve` with ports of its own; killed with all of its session if the test leaves it running."""
    ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
    command = [sys.executable, "-m", "deploy.cli", "serve", "--model", str(model), "--dtype", "float32"]
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--kv-memory", "16MiB", *ports, *flags],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield Served(process=process, log=log)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_S)
        for left in _session(process.pid):
            left.kill()


def run_line(line: str) -> str:
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def without_tensor(tmp_path: Path, source: Path, tensor: str) -> Path:
    """A copy of a checkpoint of one file that lacks a tensor."""
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in source.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    tensors = load_file(bad / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    return bad


@pytest.mark.slow
def test_a_fleet_serves_the_lines_it_prints_and_ends_on_ctrl_c_with_nothing_left(
    tmp_path: Path, next_checkpoint: Path
) -> None:
    shared = set(os.listdir("/dev/shm"))
    keys = tmp_path / "keys"
    keys.write_text("secret acme\n")
    flags = ["--prefill-tp", "1", "--decode-tp", "2", "--api-keys-file", str(keys)]
    with serving(tmp_path, next_checkpoint, *flags) as served:
        served.wait_for("Ctrl-C ends it.")
        (curl,), (call,) = served.lines("curl "), served.lines(" call --target")
        answer = json.loads(run_line(curl))
        assert answer["usage"]["completion_tokens"] > 0
        assert run_line(call).strip()
        address = re.search(r"Ray is up at (\S+)", served.text())
        assert address is not None
        status = json.loads(run_line(f"{sys.executable} -m deploy.cli status --json --ray-address {address[1]}"))
        assert [(each["info"]["role"], len(each["ranks"])) for each in status] == [("decode", 2), ("prefill", 1)]
        everything = served.processes()
        # A terminal's Ctrl-C reaches the whole group; an impatient user sends two.
        os.killpg(served.process.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(served.process.pid, signal.SIGINT)
        assert served.process.wait(STOP_S) == 0, served.text()
        assert [each for each in everything if each.is_running()] == []
        assert _session(served.process.pid) == []
    assert "Traceback" not in served.text()
    assert set(os.listdir("/dev/shm")) - shared == set()


@pytest.mark.slow
def test_a_member_that_cannot_start_is_told_and_everything_is_cleaned_up(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    # A file's header does not tell that a tensor is missing: ranks find out.
    bad = without_tensor(tmp_path, make_checkpoint("qwen3_moe"), "model.layers.2.input_layernorm.weight")
    with serving(tmp_path, bad, "--mixed-tp", "1") as served:
        served.wait_for("Ray is up")
        everything = served.processes()
        assert served.process.wait(START_S) == 1, served.text()
        assert [each for each in everything if each.is_running()] == []
    (told,) = served.lines("error: ")
    assert "MixedPool could not start" in told
    assert "model.layers.2.input_layernorm.weight is missing" in told
    assert "Traceback" not in served.text()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["gcs_server", "raylet", "Ray is up", "ray::ServeReplica", "ray::RankHost"])
def test_a_signal_while_the_fleet_starts_ends_it_at_once(tmp_path: Path, next_checkpoint: Path, moment: str) -> None:
    with serving(tmp_path, next_checkpoint, "--mixed-tp", "1") as served:
        served.wait_until(lambda: moment in served.text() or served.runs(moment))
        everything = served.processes()
        sent = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(STOP_S) == 0, served.text()
        assert time.monotonic() - sent < 10
        assert [each for each in everything if each.is_running()] == []
        assert _session(served.process.pid) == []
    assert "Traceback" not in served.text()
