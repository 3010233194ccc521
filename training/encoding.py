"""Conversations to token batches: the product's own tokenizer and chat template, loss on the assistant's turn only."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from deploy.tokenizer import TextTokenizer, load_tokenizer
from deploy.tokenizer_training import save_tokenizer, train_tokenizer
from training.data import examples
from training.example import Example
from training.layers import CHUNK

VOCAB_SIZE = 1024
MAX_TOKENS = 1024
POOL_EXAMPLES = 512
"""Drawn at once and sorted by length, so that a batch holds little padding."""
_TOKENIZER_EXAMPLES = 20000


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences padded at the right to one length."""

    tokens_BT: Tensor
    """int64."""
    targets_BT: Tensor
    """The next token where it belongs to the assistant's turn, else -100."""


def make_tokenizer(folder: Path) -> TextTokenizer:
    """Train the tokenizer on the training side of the data, save it with the chat template, and load it."""
    drawn = islice(examples("tokenizer", held_out=False), _TOKENIZER_EXAMPLES)
    texts = (text for example in drawn for text in _texts(example))
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(VOCAB_SIZE, texts), folder, model_max_length=MAX_TOKENS)
    # What is committed is ASCII, and tokenizer.json says all that the other two do.
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")), indent=1) + "\n", encoding="ascii")
    for spare in ("vocab.json", "merges.txt"):
        (folder / spare).unlink()
    return load_tokenizer(folder)


def _texts(example: Example) -> Iterator[str]:
    yield from (str(message["content"]) for message in example.messages)
    yield from (str(tool).replace("'", '"') for tool in example.tools)
    yield example.completion


def encode(tokenizer: TextTokenizer, example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and completion, each encoded alone as when the model is served; the completion ends its turn."""
    rendered = tokenizer.template.render(
        list(example.messages), [dict(tool) for tool in example.tools], None if example.thinking else False
    )
    completion = tokenizer.encode_rendered(f"{example.completion}<|im_end|>")
    return tokenizer.encode_rendered(rendered), completion


def batches(tokenizer: TextTokenizer, seed: int, pool: int, tokens_a_batch: int) -> list[Batch]:
    """The batches of one pool of examples, in an order drawn by the seed."""
    drawn = islice(examples(f"{seed} {pool}", held_out=False), POOL_EXAMPLES)
    encoded = sorted((encode(tokenizer, example) for example in drawn), key=lambda pair: len(pair[0]) + len(pair[1]))
    made: list[Batch] = []
    while encoded:
        longest = _padded(encoded[-1])
        size = min(len(encoded), max(1, tokens_a_batch // longest))
        made.append(_pad(encoded[-size:], longest))
        del encoded[-size:]
    Random(f"order {seed} {pool}").shuffle(made)
    return made


def _padded(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    # One less: the last token is only a target.
    return -(-(len(pair[0]) + len(pair[1]) - 1) // CHUNK) * CHUNK


def _pad(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], length: int) -> Batch:
    tokens_BT = torch.zeros(len(pairs), length, dtype=torch.int64)
    targets_BT = torch.full((len(pairs), length), -100, dtype=torch.int64)
    for row, (prompt, completion) in enumerate(pairs):
        whole = torch.tensor(prompt + completion)
        tokens_BT[row, : len(whole) - 1] = whole[:-1]
        targets_BT[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return Batch(tokens_BT=tokens_BT, targets_BT=targets_BT)
