"""Reads the file of API keys that http.api_keys_file names."""

from pathlib import Path

from deploy.http_guard import ApiKey
from router.errors import ConfigError


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """Keys out of a file: one a line, its tenant's name after a space; lines that begin with # are left out.

    Raises:
        ConfigError: the file cannot be read, holds no key, or a line is not KEY or KEY TENANT; never tells a key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"http.api_keys_file: {path} cannot be read ({error}); name a file of keys") from error
    keys: list[ApiKey] = []
    for number, line in enumerate(lines, start=1):
        words = line.split() if not line.lstrip().startswith("#") else []
        if len(words) > 2:
            raise ConfigError(f"http.api_keys_file: {path}, line {number}: expected KEY or KEY TENANT")
        if words:
            keys.append(ApiKey(key=words[0], tenant=words[1] if len(words) == 2 else f"key-{number}"))
    if not keys:
        raise ConfigError(f"http.api_keys_file: {path} holds no key; write one a line")
    return tuple(keys)
