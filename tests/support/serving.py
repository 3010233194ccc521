"""Builders for tests of the gateway: a tokenizer trained once, and a service over a scripted back end."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.generation import Backend, GenerationService
from deploy.metrics import GatewayMetrics
from deploy.served_model import ServedModel
from deploy.tokenizer import TextTokenizer, load_tokenizer
from deploy.tokenizer_training import save_tokenizer, train_tokenizer
from deploy.validation import Limits
from router.request import Request
from tests.support.scripted_backend import Script, ScriptedBackend

VOCAB_SIZE = 512


@lru_cache(maxsize=1)
def make_tokenizer() -> TextTokenizer:
    """Qwen's special tokens and template over a small vocabulary."""
    with TemporaryDirectory() as folder:
        save_tokenizer(train_tokenizer(VOCAB_SIZE), Path(folder), model_max_length=256)
        return load_tokenizer(Path(folder))


def make_model(*, max_model_len: int = 256) -> ServedModel:
    """The model that the service says it serves."""
    tokenizer = make_tokenizer()
    eos = tokenizer.token_id("<|im_end|>")
    assert eos is not None
    return ServedModel(
        name="tiny", max_model_len=max_model_len, vocab_size=VOCAB_SIZE, eos_token_ids=(eos,), created_unix_s=1700000000
    )


def make_service(
    backend: Backend, *, model: ServedModel | None = None, limits: Limits | None = None
) -> GenerationService:
    """A service over any back end."""
    return GenerationService(
        backend=backend,
        tokenizer=make_tokenizer(),
        model=model or make_model(),
        metrics=GatewayMetrics("tiny"),
        limits=limits,
    )


def text_script(text: str, *, finish: bool = True) -> Script:
    """A script that says a text, and then the end token."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text)
    return Script(token_ids=(*ids, *make_model().eos_token_ids) if finish else ids)


def make_backend(script: Script | str | Callable[[Request], Script]) -> ScriptedBackend:
    """A back end that gives every request the same, or what a function says."""
    match script:
        case str():
            fixed = text_script(script)
            return ScriptedBackend(script=lambda _: fixed)
        case Script():
            return ScriptedBackend(script=lambda _: script)
        case _:
            return ScriptedBackend(script=script)
