"""Typed reading of one JSON object: every field is read once, and what nobody read is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


class _Required:
    """Marks a field without a default."""


REQUIRED = _Required()


def read_json_object(path: Path) -> dict[str, Json]:
    """Parse a JSON file that holds one object.

    Raises:
        ValueError: the file is missing, unreadable, no JSON, or no object; names the file and the remedy.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; give a folder that holds a Hugging Face checkpoint") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}; fetch the file again")
    return value


class Fields:
    """One JSON object, the file it came from, and which of its fields were read."""

    def __init__(self, values: Mapping[str, Json], source: str) -> None:
        self._values = values
        self.source = source
        self._read: set[str] = set()

    def error(self, name: str, expected: str) -> ValueError:
        """A ValueError that names file, field and value and says what would do."""
        return ValueError(f"{self.source}: {name} is {json.dumps(self._values.get(name))}; {expected}")

    def present(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> Json:
        """The field as it is, None when missing; counts as read."""
        self._read.add(name)
        return self._values.get(name)

    def integer(self, name: str, default: int | _Required = REQUIRED, *, minimum: int = 1) -> int:
        """An int of at least `minimum`; null counts as missing."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, f"it must be an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float | _Required = REQUIRED, *, or_zero: bool = False) -> float:
        """A finite number above zero (or zero too); null counts as missing."""
        value = self._value(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if not fits or (value == 0 and not or_zero):
            raise self.error(name, f"it must be a finite number {'of at least' if or_zero else 'above'} 0")
        assert isinstance(value, int | float)
        return float(value)

    def optional_number(self, name: str, *, or_zero: bool = False) -> float | None:
        """Like `number`, None when missing or null."""
        self._read.add(name)
        return self.number(name, or_zero=or_zero) if self.present(name) else None

    def flag(self, name: str, default: bool | _Required = REQUIRED) -> bool:
        """true or false; null counts as missing."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def text(self, name: str, default: str | _Required = REQUIRED) -> str:
        """A string; null counts as missing."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.error(name, "it must be a string")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of non-negative ints, or one alone; empty when missing or null."""
        value = self.raw(name)
        if value is None:
            return ()
        found: list[int] = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, int) or isinstance(item, bool) or item < 0:
                raise self.error(name, "it must be a list of integers of at least 0")
            found.append(item)
        return tuple(found)

    def section(self, name: str) -> "Fields | None":
        """A nested object with an account of its own, None when missing or null."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "it must be an object")
        return Fields(value, f"{self.source}: {name}")

    def unread(self, harmless: frozenset[str] = frozenset()) -> list[str]:
        """Names that are there, not null, unread and not known as harmless."""
        return sorted(
            name
            for name, value in self._values.items()
            if value is not None and name not in self._read and name not in harmless
        )

    def refuse_unread(self, harmless: frozenset[str] = frozenset()) -> None:
        """Raise ValueError when a field is there that nobody read and nobody knows as harmless."""
        names = self.unread(harmless)
        if names:
            raise self.error(
                names[0],
                "this field is not known here and might change the function; "
                f"remove it if it is harmless (unknown fields: {', '.join(names)})",
            )

    def _value(self, name: str, default: bool | float | str | _Required) -> Json:
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if isinstance(default, _Required):
            raise ValueError(f"{self.source}: required field {name} is missing; fetch the file again or add it")
        return default
