"""What `moefleet bench engine` can measure: scenarios by name."""

import re
from dataclasses import dataclass
from typing import Final, Literal

from router.errors import ConfigError

DEFAULT_SCENARIOS: Final = "single,batch8,batch16,batch32,prefill2048,prefill4x1024,startup"
_DECODE_TOKENS: Final = 128
_STARTUP_TOKENS: Final = 16
_FORMS: Final = (
    (re.compile(r"batch([1-9]\d{0,3})"), "decode"),
    (re.compile(r"prefill([1-9]\d{0,6})"), "prefill"),
    (re.compile(r"prefill([1-9]\d{0,3})x([1-9]\d{0,6})"), "prefill"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Prompts of one length that are served together."""

    name: str
    kind: Literal["decode", "prefill", "startup"]
    num_prompts: int
    prompt_tokens: int
    new_tokens: int

    @property
    def num_tokens(self) -> int:
        """Of one sequence at its end."""
        return self.prompt_tokens + self.new_tokens


def parse_scenarios(text: str) -> tuple[Scenario, ...]:
    """Scenarios out of a list such as "single,batch8,prefill4x1024".

    Raises:
        ConfigError: a name is none of the known forms.
    """
    return tuple(_parse(name.strip()) for name in text.split(","))


def _parse(name: str) -> Scenario:
    if name == "startup":
        return Scenario(name=name, kind="startup", num_prompts=1, prompt_tokens=_STARTUP_TOKENS, new_tokens=1)
    if name == "single":
        return _decode(name, 1)
    for form, kind in _FORMS:
        match = form.fullmatch(name)
        if match is not None and kind == "decode":
            return _decode(name, int(match[1]))
        if match is not None:
            *count, length = (int(group) for group in match.groups())
            return Scenario(
                name=name, kind="prefill", num_prompts=count[0] if count else 1, prompt_tokens=length, new_tokens=1
            )
    raise ConfigError(
        f"--scenario: {name!r} is none of single, batchN (N sequences at once), prefillL (a prompt of L tokens), "
        "prefillNxL, startup; such as single,batch8,prefill2048"
    )


def _decode(name: str, num_prompts: int) -> Scenario:
    return Scenario(
        name=name,
        kind="decode",
        num_prompts=num_prompts,
        prompt_tokens=_DECODE_TOKENS,
        new_tokens=_DECODE_TOKENS,
    )
