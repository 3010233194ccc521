"""Measures a demo model on prompts it has not seen: `python -m training.evaluate --model FOLDER`.

The product's own engine answers them greedily, as it would for a client. An answer is right when it is the expected
text to the letter, behind whatever reasoning came first. For a checkpoint with a multi-token prediction (MTP) head it
also tells how often the head, given the model's true hidden state and next token, names the token after that.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from cluster.config import EngineConfig
from cluster.resolve import resolve_engine
from cluster.spawn import LocalReplica
from deploy.generate import generate_all
from deploy.tokenizer import TextTokenizer, load_tokenizer
from router.request import Request, RequestId, SamplingParams
from training.checkpoint import load
from training.data import examples
from training.encoding import encode
from training.example import Example
from training.layers import CHUNK

_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """An example with what the model wrote."""

    example: Example
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    right: bool


def draw_unseen(number: int) -> list[Example]:
    """Test conversations, `number` for each task with and without thinking as far as the task has both."""
    wanted: dict[tuple[str, bool], list[Example]] = {}
    # Twenty kinds at most; the rarest is about one in a hundred.
    for example in islice(examples("test", held_out=True), 200 * number):
        kind = wanted.setdefault((example.task, example.thinking), [])
        if len(kind) < number:
            kind.append(example)
    return [example for kind in sorted(wanted) for example in wanted[kind]]


def answer(folder: Path, asked: Sequence[Example]) -> list[Answered]:
    """Let the engine answer all of them together, greedily, in float32."""
    tokenizer = load_tokenizer(folder)
    engine = resolve_engine(EngineConfig(model=folder, dtype="float32", threads=1))
    stop = tuple(filter(None, (tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>"))))
    sampling = SamplingParams(max_tokens=_MAX_NEW_TOKENS, temperature=0.0, stop_token_ids=stop)
    prompts = [encode(tokenizer, example)[0] for example in asked]
    requests = [
        Request(id=RequestId(f"test{index}"), prompt_ids=prompt, sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]
    with LocalReplica(engine) as replica:
        outputs = generate_all(engine, replica.ranks, requests)
    found = [tuple(event.token_id for event in events if event.token_id is not None) for events in outputs]
    return [
        Answered(example=example, prompt_ids=prompt, output_ids=ids, right=_is_right(tokenizer, example, ids))
        for example, prompt, ids in zip(asked, prompts, found, strict=True)
    ]


def _is_right(tokenizer: TextTokenizer, example: Example, output_ids: tuple[int, ...]) -> bool:
    text = tokenizer.decode(output_ids)
    if example.thinking:
        _, found, text = text.rpartition("</think>")
        if not found:
            return False
    return text.strip() == example.answer


@torch.no_grad()
def mtp_acceptance(folder: Path, answered: Sequence[Answered]) -> tuple[int, int]:
    """Of the generated tokens behind each output's first: how many the MTP head named, and how many there are."""
    model = load(folder).eval()
    accepted = drafted = 0
    for each in answered:
        tokens = torch.tensor([each.prompt_ids + each.output_ids])
        # The delta rule takes whole chunks; what is behind the end changes nothing before it.
        padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % CHUNK))
        logits_BTV = model(padded).mtp_logits_BTV
        assert logits_BTV is not None
        drafts = logits_BTV[0].argmax(-1)
        for index in range(len(each.prompt_ids) + 1, tokens.shape[1]):
            accepted += int(drafts[index - 2] == tokens[0, index])
            drafted += 1
    return accepted, drafted


def table(answered: Sequence[Answered]) -> Iterator[str]:
    """Markdown rows: right answers of each task, without and with thinking."""
    yield "| task | without thinking | with thinking |"
    yield "|---|---|---|"
    for task in sorted({each.example.task for each in answered}):
        cells = []
        for thinking in (False, True):
            rows = [each.right for each in answered if (each.example.task, each.example.thinking) == (task, thinking)]
            cells.append(f"{100 * sum(rows) / len(rows):.1f}% of {len(rows)}" if rows else "")
        yield f"| {task} | {cells[0]} | {cells[1]} |"
    yield f"| all | {100 * sum(each.right for each in answered) / len(answered):.1f}% of {len(answered)} | |"


def main() -> None:
    """Read the command line, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100, help="of each task, with and without thinking")
    parser.add_argument("--wrong", action="store_true", help="print what was answered wrongly")
    given = parser.parse_args()
    answered = answer(given.model, draw_unseen(given.prompts))
    print("\n".join(table(answered)))
    if given.wrong:
        tokenizer = load_tokenizer(given.model)
        for each in answered:
            if not each.right:
                asked, expected = each.example.messages[-1]["content"], each.example.answer
                print(json.dumps({"asked": asked, "expected": expected, "wrote": tokenizer.decode(each.output_ids)}))
    if json.loads((given.model / "config.json").read_text(encoding="utf-8")).get("num_nextn_predict_layers"):
        accepted, drafted = mtp_acceptance(given.model, answered)
        print(f"MTP depth 1: {accepted} of {drafted} tokens ({100 * accepted / drafted:.1f}%)")


if __name__ == "__main__":
    main()
