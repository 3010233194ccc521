"""The yardstick itself: it must find a wrong token."""

from pathlib import Path

import torch

from tests.support.exactness import LOGIT_TIE, Difference, Reference, first_difference, make_requests
from tests.support.reference import make_reference


def test_changed_token_is_found_at_its_place_and_is_no_tie(tmp_path: Path) -> None:
    reference = Reference.of(make_reference(tmp_path, "qwen3_moe"))
    (request,) = make_requests([(1, 2, 3)])
    tokens: list[int] = []
    for _ in range(8):
        logits_TV, _ = reference.forward((*request.prompt_ids, *tokens))
        tokens.append(int(logits_TV[-1].argmax()))
    assert first_difference(reference, 0, request, tokens) is None
    logits_TV, margins_T = reference.forward((*request.prompt_ids, *tokens[:5]))
    tokens[5] = int(logits_TV[-1].argmin())
    found = first_difference(reference, 0, request, tokens)
    assert found is not None
    assert found.index == 5
    assert found.logit_margin > LOGIT_TIE
    assert torch.isfinite(margins_T).all()


def test_near_tie_of_logits_or_experts_is_accepted_and_told() -> None:
    near = Difference(prompt=0, index=3, logit_margin=1e-5, router_margin=0.5)
    flip = Difference(prompt=0, index=3, logit_margin=2.0, router_margin=1e-6)
    clear = Difference(prompt=0, index=3, logit_margin=2.0, router_margin=0.5)
    assert (near.is_tie, flip.is_tie, clear.is_tie) == (True, True, False)
    assert "logit margin 1.00e-05" in str(near)
