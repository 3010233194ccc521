"""`moefleet demo`: the config that serves one of the trained demo models of this package by two pools of two ranks."""

from pathlib import Path
from typing import Final, Literal

from deploy.config import ServeConfig, parse_config
from deploy.config_file import load_config_file

DemoArch = Literal["qwen3_next", "qwen3_moe"]

CONFIG_FILE: Final = Path(__file__).with_name("demo.yaml")
MODELS: Final = Path(__file__).with_name("demo_models")
"""A checkpoint folder for each family; `training/` makes them."""


def demo_config(arch: DemoArch, *, http_port: int | None = None, grpc_port: int | None = None) -> ServeConfig:
    """The config of demo.yaml with the demo model of a family.

    Args:
        arch: model family.
        http_port: instead of the file's; so grpc_port.
    """
    mapping = load_config_file(CONFIG_FILE) | {"model": str(MODELS.resolve() / arch)}
    for section, port in (("http", http_port), ("grpc", grpc_port)):
        options = mapping[section]
        assert isinstance(options, dict)
        if port is not None:
            options["port"] = port
    return parse_config(mapping)
