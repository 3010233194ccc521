"""The model that a gateway serves: its name, limits and sampling defaults, read from a checkpoint's JSON files."""

import json
from dataclasses import dataclass
from pathlib import Path

from router.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a request gets where it says nothing (`generation_config.json`)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    """Most new tokens where the request names no limit; None lets it fill the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the gateway must know of the model; it never opens the weights."""

    name: str
    max_model_len: int
    """Prompt and output tokens of one request together."""
    vocab_size: int
    """Rows of the output layer: the token ids that the model can choose."""
    eos_token_ids: tuple[int, ...] = ()
    defaults: SamplingDefaults = SamplingDefaults()
    created_unix_s: int = 0


def load_served_model(path: Path, *, name: str, max_model_len: int | None = None) -> ServedModel:
    """Read a checkpoint's `config.json` and `generation_config.json`.

    Args:
        path: the checkpoint folder.
        name: the model name that clients use.
        max_model_len: what the engines take, in tokens, with YaRN more than the file names; None takes the file's.

    Raises:
        CheckpointError: a file is missing or damaged, or a field is missing or of the wrong type.
    """
    config_file = path / "config.json"
    config = _text_model(_read_json(config_file))
    generation_file = path / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    limit = _integer(config, "max_position_embeddings", config_file)
    eos = dict.fromkeys(
        [*_ids(config, "eos_token_id", config_file), *_ids(generation, "eos_token_id", generation_file)]
    )
    return ServedModel(
        name=name,
        max_model_len=max_model_len or limit,
        vocab_size=_integer(config, "vocab_size", config_file),
        eos_token_ids=tuple(eos),
        defaults=_defaults(generation, generation_file),
        created_unix_s=int(config_file.stat().st_mtime),
    )


def _text_model(config: dict[str, object]) -> dict[str, object]:
    """A multimodal model's config.json describes its text model in a section."""
    text = config.get("text_config")
    return {str(key): value for key, value in text.items()} if isinstance(text, dict) else config


def _defaults(generation: dict[str, object], file: Path) -> SamplingDefaults:
    base = SamplingDefaults()
    max_tokens = generation.get("max_new_tokens")
    # do_sample false asks for greedy decoding, whatever the temperature beside it.
    greedy = generation.get("do_sample") is False
    return SamplingDefaults(
        temperature=0.0 if greedy else _number(generation, "temperature", base.temperature, file),
        top_p=_number(generation, "top_p", base.top_p, file),
        top_k=int(_number(generation, "top_k", base.top_k, file)),
        min_p=_number(generation, "min_p", base.min_p, file),
        repetition_penalty=_number(generation, "repetition_penalty", base.repetition_penalty, file),
        max_tokens=None if max_tokens is None else _integer(generation, "max_new_tokens", file),
    )


def _read_json(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); name a checkpoint folder") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _integer(config: dict[str, object], key: str, file: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{file}: {key} must be a positive integer, found {value!r}")
    return value


def _number(config: dict[str, object], key: str, default: float, file: Path) -> float:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{file}: {key} must be a number, found {value!r}")
    return value


def _ids(config: dict[str, object], key: str, file: Path) -> list[int]:
    value = config.get(key)
    ids: list[object] = [] if value is None else value if isinstance(value, list) else [value]
    checked = [each for each in ids if isinstance(each, int) and not isinstance(each, bool)]
    if len(checked) != len(ids):
        raise CheckpointError(f"{file}: {key} must be a token id or a list of them, found {value!r}")
    return checked
