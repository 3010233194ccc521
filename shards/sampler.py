"""Chooses each row's next token from its logits, and reports raw log probabilities.

N rows to sample, V vocabulary, M rows of one group, W candidates a row (the whole vocabulary or its best part).

A row's token is a function of its own logits, sampling, position and history. In this order:
1. raw log probabilities (float32 log_softmax of the untouched logits) are what is reported;
2. logit_bias is added;
3. while fewer than min_tokens tokens were generated, stop_token_ids get -inf;
4. repetition_penalty r, for every token of prompt or output: a positive logit is divided by r, another multiplied;
5. presence_penalty (once) and frequency_penalty (per occurrence) are taken off tokens of the output;
6. temperature 0 takes the largest logit, the lowest id where several are equal; otherwise, in float64, weights are
   exp((logit - largest logit) / temperature), which no temperature can make overflow;
7. top_k keeps the k largest weights; top_p keeps the largest weights until their share of what top_k kept reaches
   top_p; min_p keeps weights of at least min_p times the largest. What equals the last kept weight is kept too, so
   that no order among equals matters;
8. one uniform of (seed, position) is looked up in the running sum of the kept weights over ascending token ids.
A row that has a raw logit of NaN or infinity, or none above minus infinity, gets NO_TOKEN instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.batch import NO_TOKEN, LogprobColumns, RowSampling
from shards.kernels.interface import Kernels
from shards.noise import uniform

_WINDOW = 512
"""Rows whose top_k is below half of this look at their best _WINDOW tokens only; the result is the same bits."""
_MAX_ROWS = 64
"""Rows worked on at once: bounds scratch memory at a few times 64 x V x 8 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """Columns of M rows that draw at random, on the logits' device."""

    temperature_M: Tensor
    top_k_M: Tensor
    top_p_M: Tensor
    min_p_M: Tensor
    uniform_M: Tensor

    @staticmethod
    def of(rows: list[int], samplings: list[RowSampling], positions_N: list[int], device: torch.device) -> "_Draw":
        """The columns of `rows`; float64 but for top_k (int64)."""
        chosen = [samplings[i] for i in rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return _Draw(
            temperature_M=column([s.temperature for s in chosen]),
            top_k_M=torch.tensor([s.top_k for s in chosen], dtype=torch.int64, device=device),
            top_p_M=column([s.top_p for s in chosen]),
            min_p_M=column([s.min_p for s in chosen]),
            uniform_M=column([uniform(samplings[i].seed, positions_N[i]) for i in rows]),
        )


class Sampler:
    """Samples rows of logits of one vocabulary on one device; holds no state of any row."""

    def __init__(self, vocab_size: int, device: torch.device, kernels: Kernels) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._kernels = kernels

    def best(self, logits_NV: Tensor) -> Tensor:
        """What `sample` gives rows whose sampling `is_plain` -> token ids or NO_TOKEN, int64 [N].

        Args:
            logits_NV: as in `sample`.

        Raises:
            ValueError: the logits lack a part of the vocabulary.
        """
        self._check_vocabulary(logits_NV)
        return self._kernels.best_tokens(logits_NV, self._vocab_size)

    def sample(
        self,
        logits_NV: Tensor,
        samplings: list[RowSampling],
        positions_N: list[int],
        histories: list[tuple[Tensor, int]],
    ) -> tuple[Tensor, LogprobColumns | None]:
        """Choose one token a row, as the module's text says.

        Args:
            logits_NV: float32 [N, V]; columns beyond the vocabulary (padding) are not looked at. Left as it is.
            samplings: how each row samples.
            positions_N: absolute position of the token being chosen (the sequence's length before it).
            histories: each row's tokens so far, 1-D int32 or int64, prompt and output; and the prompt's length.

        Returns:
            token ids (or NO_TOKEN) int64 [N] on the logits' device, and, if any row has `logprobs`, columns with an
            entry for every row. An entry holds the row's own number of alternatives; a row that did not ask has
            logprob 0.0, rank 0 and none.

        Raises:
            ValueError: the arguments differ in length, or the logits lack a part of the vocabulary.
        """
        num_rows = logits_NV.shape[0]
        if not num_rows == len(samplings) == len(positions_N) == len(histories):
            raise ValueError(
                f"logits of {num_rows} rows need as many samplings, positions and histories, got "
                f"{len(samplings)}, {len(positions_N)}, {len(histories)}"
            )
        best_N = self.best(logits_NV)
        raw_NV = self._in_vocabulary(logits_NV)
        logits_NV = self._penalized(raw_NV, samplings, histories)
        drawn = [i for i, s in enumerate(samplings) if s.temperature > 0]
        unchanged = logits_NV is raw_NV or len(drawn) == num_rows
        tokens_N = best_N.clone() if unchanged else logits_NV.argmax(dim=-1)
        for start in range(0, len(drawn), _MAX_ROWS):
            rows = drawn[start : start + _MAX_ROWS]
            tokens_N[rows] = self._draw(logits_NV, rows, samplings, positions_N)
        logprobs = self._logprobs(raw_NV, tokens_N.clamp_min(0), samplings)
        return torch.where(best_N == NO_TOKEN, NO_TOKEN, tokens_N), logprobs

    def prompt_logprob_columns(self, logits_NV: Tensor, next_tokens_N: Tensor, num_top: int) -> LogprobColumns:
        """Raw log probabilities of the prompt's own next tokens.

        Args:
            logits_NV: float32 [N, V], one row a prompt position.
            next_tokens_N: the token that follows each position, int32 or int64.
            num_top: alternatives reported a position, best first.
        """
        raw_NV = self._in_vocabulary(logits_NV)
        return _columns(raw_NV, next_tokens_N.to(raw_NV.device, torch.int64), num_top)

    def _in_vocabulary(self, logits_NV: Tensor) -> Tensor:
        self._check_vocabulary(logits_NV)
        return logits_NV[:, : self._vocab_size]

    def _check_vocabulary(self, logits_NV: Tensor) -> None:
        if logits_NV.shape[1] < self._vocab_size:
            raise ValueError(f"logits have {logits_NV.shape[1]} columns, the vocabulary has {self._vocab_size} tokens")

    def _penalized(self, raw_NV: Tensor, samplings: list[RowSampling], histories: list[tuple[Tensor, int]]) -> Tensor:
        """Steps 2 to 5; raw_NV itself where no row asks for any."""
        touched = [i for i, (s, h) in enumerate(zip(samplings, histories, strict=True)) if _is_penalized(s, h)]
        if not touched:
            return raw_NV
        logits_NV = raw_NV.clone()
        for i in touched:
            _penalize(logits_NV[i], samplings[i], *histories[i])
        return logits_NV

    def _draw(self, logits_NV: Tensor, rows: list[int], samplings: list[RowSampling], positions_N: list[int]) -> Tensor:
        """Steps 6 to 8 for `rows` -> int64 [M]."""
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        window = min(_WINDOW, self._vocab_size)
        narrow = [m for m, i in enumerate(rows) if 0 < samplings[i].top_k <= window // 2]
        wide = [m for m, i in enumerate(rows) if not 0 < samplings[i].top_k <= window // 2]
        if narrow:
            best_MW, ids_MW = logits_NV[[rows[m] for m in narrow]].topk(window, dim=-1)
            ks_M = torch.tensor([samplings[rows[m]].top_k for m in narrow], device=self._device)
            # Equals of the k-th best may lie outside of the window: such a row looks at everything.
            whole_M = best_MW.gather(1, ks_M[:, None] - 1)[:, 0] > best_MW[:, -1]
            kept = [j for j, whole in enumerate(whole_M.tolist()) if whole]
            wide += [m for j, m in enumerate(narrow) if j not in set(kept)]
            if kept:
                ids_MW = ids_MW[kept].sort(dim=-1).values
                where = [narrow[j] for j in kept]
                picked = [rows[m] for m in where]
                columns = _Draw.of(picked, samplings, positions_N, self._device)
                index_M1 = _draw(logits_NV[picked].gather(1, ids_MW), columns)
                tokens[where] = ids_MW.gather(1, index_M1)[:, 0]
        if wide:
            picked = [rows[m] for m in wide]
            tokens[wide] = _draw(logits_NV[picked], _Draw.of(picked, samplings, positions_N, self._device))[:, 0]
        return tokens

    def _logprobs(self, raw_NV: Tensor, tokens_N: Tensor, samplings: list[RowSampling]) -> LogprobColumns | None:
        """Columns of every row if one asks; rows of equal number of alternatives are worked out together."""
        asking: dict[int, list[int]] = {}
        for i, s in enumerate(samplings):
            if s.logprobs is not None:
                asking.setdefault(s.logprobs, []).append(i)
        if not asking:
            return None
        num_rows = len(samplings)
        logprobs, ranks = [0.0] * num_rows, [0] * num_rows
        top_ids: list[list[int]] = [[] for _ in samplings]
        top_logprobs: list[list[float]] = [[] for _ in samplings]
        for num_top, rows in asking.items():
            part = _columns(raw_NV[rows], tokens_N[rows], num_top)
            for j, i in enumerate(rows):
                logprobs[i], ranks[i] = part.logprobs_N[j], part.ranks_N[j]
                top_ids[i], top_logprobs[i] = part.top_ids_NK[j], part.top_logprobs_NK[j]
        return LogprobColumns(logprobs_N=logprobs, ranks_N=ranks, top_ids_NK=top_ids, top_logprobs_NK=top_logprobs)


def _is_penalized(s: RowSampling, history: tuple[Tensor, int]) -> bool:
    """Whether steps 2 to 5 change anything for this row."""
    if s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0 or s.logit_bias:
        return True
    return bool(s.min_tokens and s.stop_token_ids) and history[0].shape[0] - history[1] < s.min_tokens


def _penalize(logits_V: Tensor, s: RowSampling, tokens: Tensor, prompt_len: int) -> None:
    """Steps 2 to 5 on one row, in place."""
    device = logits_V.device
    if s.logit_bias:
        ids = torch.tensor([i for i, _ in s.logit_bias], device=device)
        logits_V.index_add_(0, ids, torch.tensor([b for _, b in s.logit_bias], dtype=logits_V.dtype, device=device))
    if tokens.shape[0] - prompt_len < s.min_tokens and s.stop_token_ids:
        logits_V[torch.tensor(s.stop_token_ids, device=device)] = -torch.inf
    tokens = tokens.to(device, torch.int64)
    if s.repetition_penalty != 1.0:
        seen = tokens.unique()
        old = logits_V[seen]
        logits_V[seen] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        ids, counts = tokens[prompt_len:].unique(return_counts=True)
        logits_V[ids] -= s.frequency_penalty * counts.to(logits_V.dtype) + s.presence_penalty


def _draw(logits_MW: Tensor, draw: _Draw) -> Tensor:
    """Steps 6 to 8 -> index int64 [M, 1] into the candidates, which lie in ascending token ids.

    A running sum is the same bits with zero weights in between, and its end stands in for a sum, whose order may
    depend on the number of rows: so that neither the window nor the other rows matter.
    """
    logits_MW = logits_MW.double()
    weights_MW = ((logits_MW - logits_MW.amax(dim=-1, keepdim=True)) / draw.temperature_M[:, None]).exp()
    num_candidates = weights_MW.shape[1]
    limited_M = (draw.top_k_M > 0) & (draw.top_k_M < num_candidates)
    if bool(limited_M.any()):
        largest_k = int(draw.top_k_M[limited_M].max())
        last_M1 = torch.where(limited_M, draw.top_k_M - 1, 0)[:, None]
        floor_M1 = weights_MW.topk(largest_k, dim=-1).values.gather(1, last_M1)
        weights_MW = weights_MW.masked_fill((weights_MW < floor_M1) & limited_M[:, None], 0.0)
    nucleus = (draw.top_p_M < 1.0).nonzero()[:, 0]
    if len(nucleus):
        part = weights_MW[nucleus]
        weights_MW[nucleus] = part.masked_fill(part < _nucleus_floor(part, draw.top_p_M[nucleus]), 0.0)
    weights_MW = weights_MW.masked_fill(weights_MW < draw.min_p_M[:, None], 0.0)
    sums_MW = weights_MW.cumsum(dim=-1)
    total_M1 = sums_MW[:, -1:].contiguous()
    # uniform * total may round up to total, behind which there is no token.
    target_M1 = torch.minimum(draw.uniform_M[:, None] * total_M1, torch.nextafter(total_M1, torch.zeros_like(total_M1)))
    return torch.searchsorted(sums_MW, target_M1, right=True).clamp_max(num_candidates - 1)


def _nucleus_floor(weights_MW: Tensor, top_p_M: Tensor) -> Tensor:
    """The smallest weight that top_p keeps -> [M, 1]."""
    goal_M1 = weights_MW.cumsum(dim=-1)[:, -1:] * top_p_M[:, None]
    head = weights_MW.topk(min(2 * _WINDOW, weights_MW.shape[1]), dim=-1).values
    if bool((head.cumsum(dim=-1)[:, -1:] < goal_M1).any()):
        head = weights_MW.sort(dim=-1, descending=True).values
    sums = head.cumsum(dim=-1)
    # Rounding may leave the descending sum just below the goal: then the last one counts.
    index_M1 = torch.searchsorted(sums, goal_M1.contiguous()).clamp_max(head.shape[1] - 1)
    return head.gather(1, index_M1)


def _columns(raw_NV: Tensor, tokens_N: Tensor, num_top: int) -> LogprobColumns:
    """Log probabilities of tokens_N and of the num_top best, the lower id first where equal."""
    logprobs: list[float] = []
    ranks: list[int] = []
    top_ids: list[list[int]] = []
    top_logprobs: list[list[float]] = []
    for start in range(0, raw_NV.shape[0], _MAX_ROWS):
        all_NV = raw_NV[start : start + _MAX_ROWS].log_softmax(dim=-1)
        own_N1 = all_NV.gather(1, tokens_N[start : start + _MAX_ROWS, None])
        logprobs += own_N1[:, 0].tolist()
        ranks += ((all_NV > own_N1).sum(dim=-1) + 1).tolist()
        best = all_NV.topk(min(num_top, all_NV.shape[1]), dim=-1)
        for values, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = sorted(zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
            top_logprobs.append([value for value, _ in pairs])
            top_ids.append([token for _, token in pairs])
    return LogprobColumns(logprobs_N=logprobs, ranks_N=ranks, top_ids_NK=top_ids, top_logprobs_NK=top_logprobs)
