"""Token embedding and output head, their vocabulary spread over the lane's ranks.

T tokens of the step, N rows whose logits are wanted, C hidden size, V vocabulary, Vs = ceil(V / tp) held a rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.linear import Runtime
from shards.loading import Loader, as_slice


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Rows of a [V, C] table: this rank's token ids, zeros behind the last one where tp does not divide V."""

    weight_VsC: Tensor
    makes_logits: bool
    """The rows are laid out for `Kernels.linear`."""
    first_id: int
    vocab_size: int

    @staticmethod
    def load(loader: Loader, name: str, *, makes_logits: bool) -> "VocabShard":
        """The rank's rows of table `name`."""
        vocab, held = loader.config.vocab_size, loader.cuts.vocab
        rows = loader.tensor(name, (vocab, loader.config.hidden_size), as_slice(held))
        padding = loader.cuts.vocab_shard_size - len(held)
        if padding:
            rows = torch.cat((rows, rows.new_zeros(padding, rows.shape[1])))
        if makes_logits:
            rows = loader.kernels.lay_out(rows)
        return VocabShard(weight_VsC=rows, makes_logits=makes_logits, first_id=held.start, vocab_size=vocab)

    def embed(self, runtime: Runtime, tokens_T: Tensor) -> Tensor:
        """Token ids -> [T, C] on every rank of the lane."""
        kernels = runtime.kernels
        if self.makes_logits:
            local_T = kernels.local_ids(tokens_T, self.first_id, self.weight_VsC.shape[0])
            return runtime.comms.tp.all_reduce(kernels.take_rows(self.weight_VsC, local_T))
        return runtime.comms.tp.all_reduce(kernels.embed(self.weight_VsC, tokens_T, self.first_id))

    def logits(self, runtime: Runtime, x_NC: Tensor) -> Tensor:
        """Normed hidden rows -> float32 [N, V] on every rank of the lane."""
        return self.joined(runtime, self.part(runtime, x_NC))

    def part(self, runtime: Runtime, x_NC: Tensor) -> Tensor:
        """The logits of the ids held here -> float32 [N, Vs]."""
        with runtime.part("head"):
            return runtime.kernels.linear(x_NC, self.weight_VsC, wide=True)

    def joined(self, runtime: Runtime, part_NVs: Tensor) -> Tensor:
        """The parts of all ranks of the lane -> [N, V] on every one."""
        comm = runtime.comms.tp
        if comm.size == 1:
            return part_NVs
        parts = comm.all_gather(part_NVs).view(comm.size, part_NVs.shape[0], -1)
        return parts.transpose(0, 1).reshape(part_NVs.shape[0], -1)[:, : self.vocab_size]

    def best(self, runtime: Runtime, x_NC: Tensor) -> Tensor:
        """`Kernels.best_tokens` of these rows' logits, which need not meet -> int64 [N] on every rank of the lane."""
        comm, kernels, part_NVs = runtime.comms.tp, runtime.kernels, self.part(runtime, x_NC)
        with runtime.part("sampling"):
            if comm.size == 1:
                return kernels.best_tokens(part_NVs, self.vocab_size)
            held = min(self.weight_VsC.shape[0], self.vocab_size - self.first_id)
            pairs = comm.all_gather(kernels.best_of_part(part_NVs, held, self.first_id))
            return kernels.best_of_pairs(pairs.view(comm.size, -1, 2))
