"""Freezes every option: a new, lost or changed one shows in tests/data/options.txt, and in review.

After a change on purpose: python -m tests.test_options_frozen > tests/data/options.txt
"""

import sys
from collections.abc import Iterator
from typing import Any, Final

import typer

from deploy.cli import app
from deploy.cli_flags import FLAG_KEYS
from deploy.config import config_keys
from tests.support.source_tree import ROOT

FILE: Final = ROOT / "tests" / "data" / "options.txt"


# Typer's commands are click's, whose types it does not publish.
def option_lines(command: Any, path: str) -> Iterator[str]:
    """Each command, and under it its options with their defaults, or with the config key that they set."""
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from option_lines(inner, f"{path} {name}")
    if not hasattr(command, "commands"):
        yield path
    for option in command.params:
        names = "/".join([*option.opts, *option.secondary_opts])
        if path == "moefleet serve" and option.name in FLAG_KEYS:
            yield f"{path} {names} sets {FLAG_KEYS[option.name]}"
        else:
            needed = " (required)" if option.required else f" = {option.default}"
            yield f"{path} {names}{needed}"


def current_options() -> str:
    """What the file should hold."""
    commands = list(option_lines(typer.main.get_command(app), "moefleet"))
    keys = [f"config {key} = {value}" for key, value in config_keys().items()]
    return "\n".join([*commands, *keys]) + "\n"


def test_options_are_those_that_were_agreed_on() -> None:
    frozen, current = FILE.read_text(encoding="utf-8").splitlines(), current_options().splitlines()
    lost = [line for line in frozen if line not in current]
    new = [line for line in current if line not in frozen]

    assert (lost, new) == ([], []), (
        "options changed; if on purpose, tell users of lost ones and run: "
        "python -m tests.test_options_frozen > tests/data/options.txt"
    )
    assert frozen == current


if __name__ == "__main__":
    sys.stdout.write(current_options())
