"""Writes a ServeConfig as a Ray Serve config document, as `serve deploy` and a RayService take it."""

from typing import Final

import yaml

from deploy.config import ServeConfig, config_mapping

APP_NAME: Final = "moefleet"
IMPORT_PATH: Final = "deploy.app:build"


def serve_document(config: ServeConfig) -> dict[str, object]:
    """The document's values. It names files of keys and certificates, and holds none of them."""
    return {
        # Gateways listen themselves.
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": config_mapping(config),
            }
        ],
    }


def render_document(config: ServeConfig) -> str:
    """The document as YAML."""
    return yaml.safe_dump(serve_document(config), sort_keys=False)
