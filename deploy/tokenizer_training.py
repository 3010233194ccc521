"""Trains a byte-level BPE tokenizer with Qwen's pre-tokenizer and special tokens on Python's own documentation."""

import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from router.errors import ConfigError

# Qwen2's split: contractions, words with one leading non-letter, single digits, punctuation, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In Qwen's order, straight after the vocabulary.
_CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Kept in decoded text, because the server parses them.
_TEXT_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_NUM_BYTES = 256
MIN_VOCAB_SIZE = _NUM_BYTES + len(_CONTROL_TOKENS) + len(_TEXT_TOKENS)
_TEMPLATE = Path(__file__).with_name("checkpoint_chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialIds:
    """Ids that config.json and generation_config.json name."""

    end_of_text: int
    turn_end: int


def train_tokenizer(vocab_size: int, texts: Iterable[str] | None = None) -> Tokenizer:
    """Train a tokenizer whose vocabulary and special tokens together have at most `vocab_size` entries.

    Args:
        vocab_size: upper limit.
        texts: what to train on instead of Python's documentation.

    Raises:
        ConfigError: vocab_size has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small for a tokenizer: 256 bytes and the special tokens need "
            f"{MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(_CONTROL_TOKENS) - len(_TEXT_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(max_chars=250 * vocab_size) if texts is None else texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _TEXT_TOKENS])
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Look up the ids that the configs name."""
    end_of_text, turn_end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    assert end_of_text is not None
    assert turn_end is not None
    return SpecialIds(end_of_text=end_of_text, turn_end=turn_end)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, model_max_length: int) -> None:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json (with the chat template)."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in _CONTROL_TOKENS,
        }
        for token in _CONTROL_TOKENS + _TEXT_TOKENS
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(_CONTROL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": _TEMPLATE.read_text(encoding="ascii"),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _training_text(*, max_chars: int) -> list[str]:
    """The language reference's topics, then the standard library's sources, until max_chars."""
    texts: list[str] = []
    room = max_chars
    for name in sorted(topics.topics):
        texts.append(topics.topics[name][: max(room // 2, 0)])
        room -= len(texts[-1])
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if room <= 0:
            break
        texts.append(file.read_text(encoding="utf-8", errors="replace")[:room])
        room -= len(texts[-1])
    return texts
