"""GenerationDefaults: the sampling defaults and stop ids that a checkpoint's generation_config.json asks for."""

from dataclasses import dataclass
from pathlib import Path

from shards.config_fields import Fields, read_json_object


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request gets where it does not say; None: the checkpoint does not say either."""

    temperature: float | None = None
    """0.0 where the checkpoint says do_sample false."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a sequence."""


def load_generation_config(path: Path) -> GenerationDefaults:
    """Read `path`/generation_config.json; eos ids fall back to config.json's where it names none.

    A missing generation_config.json is no error. Fields that steer other decoding methods are not read.

    Raises:
        ValueError: naming file, field and value when a field has the wrong type or range.
    """
    file = path / "generation_config.json"
    fields = Fields(read_json_object(file) if file.exists() else {}, str(file))
    return GenerationDefaults(
        temperature=_temperature(fields),
        top_p=_unit(fields, "top_p"),
        top_k=fields.integer("top_k", minimum=0) if fields.present("top_k") else None,
        min_p=_unit(fields, "min_p"),
        repetition_penalty=fields.optional_number("repetition_penalty"),
        eos_token_ids=fields.integers("eos_token_id") or _model_eos(path),
    )


def _temperature(fields: Fields) -> float | None:
    if fields.present("do_sample") and not fields.flag("do_sample"):
        return 0.0
    return fields.optional_number("temperature", or_zero=True)


def _unit(fields: Fields, name: str) -> float | None:
    value = fields.optional_number(name, or_zero=True)
    if value is not None and value > 1:
        raise fields.error(name, "it must be between 0 and 1")
    return value


def _model_eos(path: Path) -> tuple[int, ...]:
    file = path / "config.json"
    fields = Fields(read_json_object(file), str(file))
    # A multimodal model's config.json describes its text model in a section.
    return (fields.section("text_config") or fields).integers("eos_token_id")
