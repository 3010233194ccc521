"""Is what our engine generates what transformers would? The yardstick of the exactness tests.

transformers runs one full float32 forward pass over prompt + our tokens; every token of ours must be its arg max. A
first difference is accepted as a tie only where the reference itself is unstable: the two logits, or the k-th and
(k+1)-th expert of some token before, are closer than float32 sums in another order can tell apart.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from router.request import Request, RequestId, SamplingParams, TokenEvent

NEW_TOKENS = 64
PROMPT_LENGTHS = (1, 3, 15, 16, 17, 33, 70, 130)
LOGIT_TIE = 1e-3
ROUTER_TIE = 1e-4
MOST_TIES = 1
"""Accepted of the prompts of one row."""
LOGPROB_TOLERANCE = 1e-4
"""Largest accepted difference of a chosen token's log probability from transformers' (float32)."""


def make_prompts(vocab_size: int, lengths: Sequence[int] = PROMPT_LENGTHS, *, seed: int = 1) -> list[tuple[int, ...]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, vocab_size, (length,), generator=generator).tolist()) for length in lengths]


def make_requests(
    prompts: Sequence[tuple[int, ...]], *, name: str = "r", sampling: SamplingParams | None = None
) -> list[Request]:
    """Greedy requests of NEW_TOKENS tokens each, unless told otherwise."""
    sampling = sampling or SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=0)
    return [
        Request(id=RequestId(f"{name}{index}"), prompt_ids=prompt, sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token at which we and the reference part."""

    prompt: int
    index: int
    logit_margin: float
    router_margin: float
    """Smallest gap of the k-th and (k+1)-th gate logit at or before that position, in any layer."""

    @property
    def is_tie(self) -> bool:
        """Whether the reference is unstable there."""
        return self.logit_margin < LOGIT_TIE or self.router_margin < ROUTER_TIE

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt} token {self.index}: logit margin {self.logit_margin:.2e}, "
            f"router margin {self.router_margin:.2e}"
        )


@dataclass(slots=True)
class Reference:
    """transformers' model, and full forward passes already made."""

    model: PreTrainedModel
    top_k: int
    passes: dict[tuple[int, ...], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Reference":
        """A reference that remembers its passes: equal outputs of many cases cost one."""
        return cls(model=model, top_k=int(getattr(model.config, "num_experts_per_tok", 0)), passes={})

    def forward(self, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Full pass -> logits float32 [T, V], smallest router margin up to each position [T]."""
        if tokens not in self.passes:
            with _router_margins(self.model, self.top_k) as margins_T, torch.no_grad():
                logits_TV = self.model(torch.tensor([tokens]), use_cache=False).logits[0].float()
            stacked = torch.stack(margins_T).amin(0) if margins_T else torch.full((len(tokens),), torch.inf)
            self.passes[tokens] = (logits_TV, stacked.cummin(0).values)
        return self.passes[tokens]


@contextmanager
def _router_margins(model: PreTrainedModel, top_k: int) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def hook(_: nn.Module, __: object, output: object) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        assert isinstance(logits, Tensor)
        top = logits.float().reshape(-1, logits.shape[-1]).topk(top_k + 1).values
        found.append(top[:, -2] - top[:, -1])

    gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    handles = [gate.register_forward_hook(hook) for gate in gates]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first_difference(reference: Reference, prompt: int, request: Request, tokens: Sequence[int]) -> Difference | None:
    """Where our tokens leave the reference's greedy path, if anywhere."""
    start = len(request.prompt_ids) - 1
    logits_TV, margins_T = reference.forward((*request.prompt_ids, *tokens))
    best_N = logits_TV[start:-1].argmax(-1)
    ours_N = torch.tensor(tokens)
    wrong = (best_N != ours_N).nonzero()
    if not len(wrong):
        return None
    index = int(wrong[0])
    row = logits_TV[start + index]
    return Difference(
        prompt=prompt,
        index=index,
        logit_margin=float(row[best_N[index]] - row[ours_N[index]]),
        router_margin=float(margins_T[start + index]),
    )


def largest_logprob_error(reference: Reference, request: Request, events: Sequence[TokenEvent]) -> float:
    """Largest difference of our chosen tokens' log probabilities from the reference's."""
    tokens = tokens_of(events)
    logits_TV, _ = reference.forward((*request.prompt_ids, *tokens))
    start = len(request.prompt_ids) - 1
    wanted_N = logits_TV[start:-1].log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    ours = [event.logprob.logprob for event in events if event.logprob is not None]
    return float((torch.tensor(ours) - wanted_N).abs().max())


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    """The token ids of one request's events."""
    assert [event.index for event in events] == list(range(len(events)))
    return [event.token_id for event in events if event.token_id is not None]


def check_against(
    reference: Reference, requests: Sequence[Request], events: Sequence[Sequence[TokenEvent]]
) -> tuple[list[Difference], list[Difference], float]:
    """Ties, real differences, and the largest log probability error up to a first difference."""
    ties: list[Difference] = []
    wrong: list[Difference] = []
    error = 0.0
    for index, (request, each) in enumerate(zip(requests, events, strict=True)):
        difference = first_difference(reference, index, request, tokens_of(each))
        if difference is None:
            error = max(error, largest_logprob_error(reference, request, each))
        else:
            (ties if difference.is_tie else wrong).append(difference)
    return ties, wrong, error


def same_bits(left: Sequence[Sequence[TokenEvent]], right: Sequence[Sequence[TokenEvent]]) -> bool:
    """Whether tokens and their log probabilities are the same."""

    def facts(events: Sequence[TokenEvent]) -> list[tuple[int | None, float]]:
        return [(event.token_id, event.logprob.logprob if event.logprob else 0.0) for event in events]

    return all(facts(a) == facts(b) for a, b in zip(left, right, strict=True))
