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
        if runtime.comms.tp.size == 1:
            return self._rows(runtime, tokens_T)
        local_T = tokens_T - self.first_id
        foreign_T = (local_T < 0) | (local_T >= self.weight_VsC.shape[0])
        rows_TC = self._rows(runtime, local_T.masked_fill(foreign_T, 0))
        return runtime.comms.tp.all_reduce(rows_TC.masked_fill(foreign_T.unsqueeze(1), 0))

    def logits(self, runtime: Runtime, x_NC: Tensor) -> Tensor:
        """Normed hidden rows -> float32 [N, V] on every rank of the lane."""
        comm = runtime.comms.tp
        part_NVs = runtime.kernels.linear(x_NC, self.weight_VsC, wide=True)
        if comm.size == 1:
            return part_NVs
        parts = comm.all_gather(part_NVs).view(comm.size, x_NC.shape[0], -1)
        return parts.transpose(0, 1).reshape(x_NC.shape[0], -1)[:, : self.vocab_size]

    def _rows(self, runtime: Runtime, ids_T: Tensor) -> Tensor:
        return runtime.kernels.take_rows(self.weight_VsC, ids_T) if self.makes_logits else self.weight_VsC[ids_T]
