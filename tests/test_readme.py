"""Runs the README's commands as they are printed, in a copy of the tree, with ports of their own."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.source_tree import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
START_S = 300
STOP_S = 60
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".demo", "__pycache__", ".*_cache", ".hypothesis", ".coverage*")
OWN_VARIABLES = (
    "MAKE",
    "MFLAGS",
    "PYTEST",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "COV",
    "OMP_",
    "RAY_",
    "TESTS",
    "DEMO",
    "VENV",
)


def fenced(kind: str, text: str = README) -> list[str]:
    """The code blocks of one kind in a text, lines joined where the shell would join them."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block.strip() for block in blocks]


def test_readme_sets_up_with_two_commands_and_shows_every_way_to_call() -> None:
    commands = fenced("sh")
    assert [command for command in commands if command.startswith("make")] == ["make demo", "make test"]
    for word in ("curl ", "moefleet call ", "moefleet status", "moefleet generate ", "torch.distributed.run "):
        assert any(word in command for command in commands), word


def test_links_of_every_text_lead_to_files() -> None:
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "k8s").glob("*.md")]
    broken = {
        f"{text.name}: {link}"
        for text in texts
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text.read_text(encoding="utf-8"))
        if not (text.parent / link).exists()
    }
    assert broken == set()


def free_port() -> int:
    """A TCP port that nothing uses now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """`make demo`, running in a copy of the tree."""

    folder: Path
    log: Path
    process: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int

    def run(self, command: str) -> str:
        """A README command against this demo, in a shell; its output."""
        here = command.replace(":8000", f":{self.http_port}").replace(":9000", f":{self.grpc_port}")
        done = subprocess.run(
            here,
            shell=True,
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{here}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout


def environment() -> dict[str, str]:
    """Ours, without what this test run was told."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}


def make_copy(folder: Path) -> None:
    """A copy of the tree with a virtual environment in which everything but moefleet is found already."""
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    subprocess.run([sys.executable, "-m", "venv", str(folder / ".venv")], check=True)
    (site,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    # A folder named in a .pth file is searched last, and its own .pth files (an editable install) are not read.
    (site / "zz_installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")


def start(folder: Path) -> Demo:
    """Start `make demo` and wait until it is up."""
    http_port, grpc_port = free_port(), free_port()
    command = ["make", "demo", f"DEMO=--http-port {http_port} --grpc-port {grpc_port}"]
    log = folder / "demo.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    until = time.monotonic() + START_S
    while "Ctrl-C ends it." not in log.read_text(encoding="utf-8"):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < until, log.read_text(encoding="utf-8")
        time.sleep(0.25)
    return Demo(folder=folder, log=log, process=process, http_port=http_port, grpc_port=grpc_port)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """`make demo` from a fresh copy; ended with Ctrl-C."""
    folder = tmp_path_factory.mktemp("readme") / "moefleet"
    make_copy(folder)
    running = start(folder)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGINT)
            running.process.wait(STOP_S)


def command_with(word: str) -> str:
    """The one README command that holds a word."""
    (command,) = [command for command in fenced("sh") if word in command]
    return command


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestCommands:
    """In the README's order: they share one demo, and the last test ends it."""

    def test_curl_lines_give_a_right_answer_a_thinking_one_and_a_tool_call(self, demo: Demo) -> None:
        plain, thinking, tool = (message_of(demo.run(line)) for line in fenced("sh") if line.startswith("curl "))
        assert (plain["content"], plain.get("reasoning")) == ("moon, pear, lamp, river", None)
        assert thinking["content"] == "347 + 289 = 636"
        assert "7+9+0=16 6" in thinking["reasoning"]
        (call,) = tool["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Boston"}

    def test_grpc_line_writes_text(self, demo: Demo) -> None:
        assert "How can I help you?" in demo.run(command_with("moefleet call "))

    def test_lines_that_the_demo_prints_work_as_printed(self, demo: Demo) -> None:
        printed = [line.strip() for line in demo.log.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in printed if line.startswith("curl ") or " call --target" in line]
        assert len(lines) == 2
        for line in lines:
            assert demo.run(line).strip()

    def test_status_shows_both_pools(self, demo: Demo) -> None:
        # There may be other clusters on this machine, so this one is named.
        shown = demo.run(f"{command_with('moefleet status')} --ray-address {ray_address(demo.process)}")
        assert "prefill" in shown
        assert "decode" in shown

    def test_openai_client_streams(self, demo: Demo) -> None:
        (snippet,) = fenced("python")
        script = demo.folder / "snippet.py"
        script.write_text(snippet.replace(":8000", f":{demo.http_port}"), encoding="utf-8")
        assert "demo model" in demo.run(".venv/bin/python snippet.py")

    def test_grpc_stub_of_the_api_text_streams(self, demo: Demo) -> None:
        (snippet,) = fenced("python", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
        script = demo.folder / "stub.py"
        script.write_text(snippet.replace(":9000", f":{demo.grpc_port}"), encoding="utf-8")
        assert "finish_reason" in demo.run(".venv/bin/python stub.py")

    def test_generate_lines_agree(self, demo: Demo) -> None:
        spawned = demo.run(command_with("moefleet generate ")).splitlines()
        (by_torchrun,) = demo.run(command_with("torch.distributed.run ")).splitlines()
        assert len(spawned) == 2
        assert spawned[0] == by_torchrun

    def test_checkpoint_line_makes_a_checkpoint(self, demo: Demo) -> None:
        demo.run(command_with("checkpoint random"))
        assert (demo.folder / ".demo" / "moe" / "config.json").exists()

    def test_make_test_runs(self, demo: Demo) -> None:
        assert " passed" in demo.run(f"{command_with('make test')} JOBS=0 TESTS=tests/router/test_prefix.py")

    def test_ctrl_c_ends_it_and_leaves_no_process(self, demo: Demo) -> None:
        processes = psutil.Process(demo.process.pid).children(recursive=True)
        assert len(processes) > 5

        os.killpg(demo.process.pid, signal.SIGINT)
        demo.process.wait(STOP_S)

        _, alive = psutil.wait_procs(processes, timeout=10)
        assert [process.name() for process in alive] == []
        assert "no process is left" in demo.log.read_text(encoding="utf-8")


def message_of(reply: str) -> Any:
    """The assistant's message of a chat completion."""
    return json.loads(reply)["choices"][0]["message"]


def ray_address(process: subprocess.Popen[bytes]) -> str:
    """host:port of the Ray cluster that a process has started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        for word in words:
            if word.startswith("--gcs-address="):
                return word.removeprefix("--gcs-address=")
    raise AssertionError("no process of a Ray cluster was found")
