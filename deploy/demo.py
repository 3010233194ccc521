"""`moefleet demo`: makes a random checkpoint, and the config that serves it by two pools of two ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from deploy.config import ServeConfig, load_config_file, parse_config
from router.errors import ConfigError

CONFIG_FILE: Final = Path(__file__).with_name("demo.yaml")
_SETTINGS: Final = {"arch": "qwen3_next", "size": "tiny", "seed": 0, "dtype": "float32"}
_MARK: Final = "moefleet-demo.json"
"""In the checkpoint's folder: what it was made with."""


def demo_config(folder: Path, *, http_port: int | None = None, grpc_port: int | None = None) -> ServeConfig:
    """The config of demo.yaml with the model in `folder`.

    Args:
        http_port: instead of the file's; so grpc_port.
    """
    mapping = load_config_file(CONFIG_FILE) | {"model": str(folder.resolve() / "model")}
    for section, port in (("http", http_port), ("grpc", grpc_port)):
        options = mapping[section]
        assert isinstance(options, dict)
        if port is not None:
            options["port"] = port
    return parse_config(mapping)


def make_demo_checkpoint(folder: Path, *, tell: Callable[[str], None]) -> Path:
    """The demo's checkpoint in `folder`/model, made unless it is there; made anew where it is of other settings.

    Args:
        tell: takes a line for a person.

    Raises:
        ConfigError: `folder`/model is there and not of the demo's making.
    """
    model = folder / "model"
    if model.exists():
        if _settings(model) == _SETTINGS:
            tell(f"using the checkpoint in {model}")
            return model
        shutil.rmtree(model)
    # Imports torch, which a checkpoint that is there does not need.
    from deploy.checkpoint import write_random_checkpoint

    tell(f"making a Qwen3-Next checkpoint of random weights in {model}")
    partial = folder / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    write_random_checkpoint("qwen3_next", "tiny", 0, partial, dtype="float32")
    (partial / _MARK).write_text(json.dumps(_SETTINGS) + "\n", encoding="utf-8")
    # Whole or not at all: a folder called `model` is complete.
    partial.rename(model)
    return model


def _settings(model: Path) -> object:
    try:
        return json.loads((model / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dir: {model} is there and was not made by the demo; name another folder") from error
