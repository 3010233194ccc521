"""Byte counts as people write them."""

import re
from typing import Final

from router.errors import ConfigError

_BINARY: Final = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | _BINARY
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str, option: str) -> int:
    """Bytes out of "268435456", "256MiB" or "1.5 GiB".

    Raises:
        ConfigError: the text is no size; names the option.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{option}: expected a size such as 256MiB or 2GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])
