"""Text to token ids and token ids to bytes, with the tokenizer and chat template of a checkpoint."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer

from router.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatTemplate(Protocol):
    """The chat template of a checkpoint."""

    @property
    def source(self) -> str:
        """The template's own text, empty if the checkpoint has none."""
        ...

    def render(
        self, messages: list[dict[str, object]], tools: list[dict[str, object]], enable_thinking: bool | None
    ) -> str:
        """Render a conversation in a sandbox.

        Raises:
            jinja2.TemplateError, TypeError, ValueError: the template refuses the conversation.
        """
        ...


class TextTokenizer:
    """One checkpoint's tokenizer; safe to use from several threads.

    Only byte-level tokenizers (all Qwen3 models) are taken: every token then has exact bytes, so that text can be
    made token by token and still equal the decoding of the whole.
    """

    def __init__(self, core: Tokenizer, template: ChatTemplate) -> None:
        description = json.loads(core.to_str())
        decoder = (description.get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            raise CheckpointError(f"tokenizer.json: decoder must be ByteLevel, found {decoder}")
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._plain: Tokenizer = Tokenizer.from_str(core.to_str())
        self._plain.encode_special_tokens = True
        self.template = template
        added = core.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        special_texts = sorted((added[token_id].content for token_id in self.special_ids), key=len, reverse=True)
        # A pattern that matches nothing where there are no special tokens.
        self.special_pattern = re.compile("|".join(map(re.escape, special_texts)) or r"(?!)")
        self._byte_of = _byte_alphabet()
        self.longest_token_chars = max(map(len, core.get_vocab()), default=1)
        """No token stands for more characters than this, so `len(text) / longest_token_chars` bounds the count."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode a whole prompt as the checkpoint's tokenizer does: special tokens written in it count as such."""
        return tuple(self._core.encode(text).ids)

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Encode a rendered chat: the template's special tokens are in it, none is added."""
        return tuple(self._core.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Encode text in which special tokens are nothing but text."""
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this vocabulary entry, if there is one."""
        return self._core.token_to_id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an id of a padded vocabulary that stands for nothing."""
        added = self._added.get(token_id)
        if added is not None:
            return added
        token = self._core.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([self._byte_of[char] for char in token])
        except KeyError:
            return token.encode()

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to the output text: none for special tokens."""
        return b"" if token_id in self.special_ids else self.token_bytes(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens without special tokens; damaged UTF-8 becomes U+FFFD."""
        return b"".join(map(self.text_bytes, token_ids)).decode("utf-8", errors="replace")


class TransformersTemplate:
    """A chat template rendered by transformers, which gives it an immutable sandbox."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        template = tokenizer.chat_template
        self.source: str = template if isinstance(template, str) else ""
        self._tokenizer = tokenizer

    def render(
        self, messages: list[dict[str, object]], tools: list[dict[str, object]], enable_thinking: bool | None
    ) -> str:
        """Render a conversation up to where the assistant's turn begins."""
        options: dict[str, bool] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        # transformers' own annotation knows neither tool calls in messages nor template variables.
        render: Callable[..., object] = self._tokenizer.apply_chat_template
        text = render(
            messages,
            tools=tools or None,
            chat_template=self.source,
            add_generation_prompt=True,
            tokenize=False,
            **options,
        )
        assert isinstance(text, str)
        return text


def check_tokenizer_file(path: Path) -> None:
    """Refuse a checkpoint folder without a tokenizer, in no time.

    Raises:
        CheckpointError: the file is missing.
    """
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path}/tokenizer.json: missing; the checkpoint needs a fast tokenizer")


def load_tokenizer(path: Path) -> TextTokenizer:
    """Load the tokenizer and chat template of a checkpoint folder. Code in the checkpoint is never run.

    Raises:
        CheckpointError: there is no usable tokenizer in the folder.
    """
    # Lazy: importing transformers takes seconds, and commands such as `moefleet status` need none of it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_tokenizer_file(path)
    try:
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: tokenizer cannot be loaded ({error})") from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise CheckpointError(f"{path}: expected a fast tokenizer, found {type(loaded).__name__}")
    return TextTokenizer(Tokenizer.from_str(loaded.backend_tokenizer.to_str()), TransformersTemplate(loaded))


def _byte_alphabet() -> dict[str, int]:
    """Character of a byte-level vocabulary -> byte (the alphabet of GPT-2, which prints each byte as one character)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet
