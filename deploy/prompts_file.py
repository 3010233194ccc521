"""The prompts of `moefleet generate`: from options, and from a file of JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from deploy.validation import SamplingInput
from router.errors import ConfigError

_SAMPLING_KEYS: Final = {field.name for field in fields(SamplingInput)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInput:
    """One prompt, as text or as token ids, and how to continue it."""

    where: str
    """What to call it in an error."""
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    sampling: SamplingInput


def parse_ids(text: str, where: str) -> tuple[int, ...]:
    """Token ids out of "1,2,3".

    Raises:
        ConfigError: something else stands there.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{where}: expected token ids separated by commas, such as 1,2,3, got {text!r}") from error


def read_prompts_file(path: Path, sampling: SamplingInput) -> list[PromptInput]:
    """Read one prompt a line: {"prompt": str} or {"prompt_ids": [int, ..]}, with sampling fields where they differ.

    Args:
        sampling: what a line gets where it says nothing.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {path}: cannot be read as UTF-8 text ({error})") from error
    found = [
        _parse_line(line, f"{path.name} line {number}", sampling)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise ConfigError(f'--prompts-file {path}: holds no prompt; give JSON lines such as {{"prompt": "Hello"}}')
    return found


def _parse_line(line: str, where: str, sampling: SamplingInput) -> PromptInput:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f'{where}: expected a JSON object such as {{"prompt": "Hello"}}, got {type(value).__name__}')
    unknown = sorted(value.keys() - {"prompt", "prompt_ids"} - _SAMPLING_KEYS)
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; known are prompt, prompt_ids and sampling fields")
    if ("prompt" in value) == ("prompt_ids" in value):
        raise ConfigError(f"{where}: give exactly one of prompt and prompt_ids")
    fields_of_line = _Line(value, where)
    sampling = fields_of_line.sampling(sampling)
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise ConfigError(f"{where}: prompt must be a string, got {type(value['prompt']).__name__}")
        return PromptInput(where=where, text=value["prompt"], sampling=sampling)
    return PromptInput(where=where, token_ids=fields_of_line.ids("prompt_ids", ()), sampling=sampling)


@dataclass(frozen=True, slots=True)
class _Line:
    """One line's object; each getter gives what the line says, or `base` where it says nothing."""

    value: dict[str, object]
    where: str

    def _refuse(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} must be {expected}, got {self.value[key]!r}")

    def whole(self, key: str, base: int | None) -> int | None:
        given = self.value.get(key, base)
        if given is not None and (not isinstance(given, int) or isinstance(given, bool)):
            raise self._refuse(key, "a whole number")
        return given

    def number(self, key: str, base: float | None) -> float | None:
        given = self.value.get(key, base)
        if given is not None and (not isinstance(given, (int, float)) or isinstance(given, bool)):
            raise self._refuse(key, "a number")
        return given

    def flag(self, key: str, base: bool) -> bool:
        given = self.value.get(key, base)
        if not isinstance(given, bool):
            raise self._refuse(key, "true or false")
        return given

    def ids(self, key: str, base: tuple[int, ...]) -> tuple[int, ...]:
        given = self.value.get(key)
        if key not in self.value:
            return base
        found = [item for item in given if type(item) is int] if isinstance(given, list) else None
        if found is None or found != given:
            raise self._refuse(key, "a list of token ids")
        return tuple(found)

    def bias(self, key: str, base: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        given = self.value.get(key)
        if key not in self.value:
            return base
        if not isinstance(given, dict):
            raise self._refuse(key, 'an object such as {"17": -5}')
        try:
            return tuple((int(token), float(bias)) for token, bias in given.items())
        except (TypeError, ValueError) as error:
            raise self._refuse(key, 'an object such as {"17": -5}') from error

    def sampling(self, base: SamplingInput) -> SamplingInput:
        """The line's sampling fields over `base`."""
        return SamplingInput(
            max_tokens=self.whole("max_tokens", base.max_tokens),
            min_tokens=self.whole("min_tokens", base.min_tokens),
            temperature=self.number("temperature", base.temperature),
            top_p=self.number("top_p", base.top_p),
            top_k=self.whole("top_k", base.top_k),
            min_p=self.number("min_p", base.min_p),
            presence_penalty=self.number("presence_penalty", base.presence_penalty),
            frequency_penalty=self.number("frequency_penalty", base.frequency_penalty),
            repetition_penalty=self.number("repetition_penalty", base.repetition_penalty),
            logit_bias=self.bias("logit_bias", base.logit_bias),
            seed=self.whole("seed", base.seed),
            stop_token_ids=self.ids("stop_token_ids", base.stop_token_ids),
            ignore_eos=self.flag("ignore_eos", base.ignore_eos),
            logprobs=self.whole("logprobs", base.logprobs),
            prompt_logprobs=self.whole("prompt_logprobs", base.prompt_logprobs),
        )


def parse_bias(entries: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """Pairs out of options like "17:-5".

    Raises:
        ConfigError: an entry is of another form.
    """
    pairs = []
    for entry in entries:
        token, _, bias = entry.partition(":")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError as error:
            raise ConfigError(f"--logit-bias: expected TOKEN_ID:BIAS, such as 17:-5, got {entry!r}") from error
    return tuple(pairs)
