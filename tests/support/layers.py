"""Single layers on the ranks of a lane, fed chunk by chunk, for comparison with transformers' modules."""

from pathlib import Path

import torch
from torch import Tensor

from shards.attention import Attention
from shards.batch import RowSampling, RowStart, StepBatch
from shards.cache import KvCache, cache_shape
from shards.comm import Comms
from shards.cuts import make_cuts
from shards.families import load_model_config
from shards.kernels.torch_kernels import TorchKernels
from shards.linear import Runtime
from shards.loading import Loader
from shards.mesh import Layout, Place
from shards.model import load_model
from shards.rope import rotary_tables
from shards.rows import Rows
from shards.weights import CheckpointReader
from tests.support.thread_comm import on_every_rank

BLOCK_SIZE = 4
MAX_LEN = 64


def run_mixer(folder: Path, layer: int, x_TC: Tensor, *, tp: int, chunk: int) -> list[Tensor]:
    """The token mixer of a layer over one sequence, `chunk` tokens a step -> [T, C] of every rank."""
    config = load_model_config(folder)
    cos_LR, sin_LR = rotary_tables(config.rope, MAX_LEN)

    def work(place: Place, comms: Comms) -> Tensor:
        cuts = make_cuts(config, place, deterministic=False)
        reader = CheckpointReader(folder)
        cpu, kernels = torch.device("cpu"), TorchKernels()
        loader = Loader(reader=reader, config=config, cuts=cuts, dtype=torch.float32, device=cpu, kernels=kernels)
        mixer = load_model(loader).layers[layer].mixer
        shape = cache_shape(
            config, tp, place.tp_rank, num_blocks=32, block_size=BLOCK_SIZE, num_slots=3, dtype=torch.float32
        )
        cache = KvCache(shape, "cpu")
        runtime = Runtime(kernels=kernels, comms=comms, exact=False)
        rows = Rows(max_rows=2, max_model_len=MAX_LEN, block_size=BLOCK_SIZE, device=torch.device("cpu"))
        outputs: list[Tensor] = []
        for first in range(0, len(x_TC), chunk):
            count = min(chunk, len(x_TC) - first)
            starts = (_start(len(x_TC)),) if first == 0 else ()
            batch = StepBatch(starts=starts, rows_S=[1], first_S=[first], counts_S=[count], samples_S=[0])
            rows.update(batch)
            step = rows.tensors(batch, cos_LR, sin_LR, (count,))
            x = x_TC[first : first + count]
            if isinstance(mixer, Attention):
                outputs.append(mixer.forward(runtime, x, step, cache.k_pools[0], cache.v_pools[0]))
            else:
                outputs.append(mixer.forward(runtime, x, step, cache.states[0]))
        return torch.cat(outputs)

    return on_every_rank(Layout(tp=tp), work)


def _start(length: int) -> RowStart:
    blocks = tuple(range(31, 31 - -(-length // BLOCK_SIZE), -1))
    return RowStart(
        row=1, token_ids=(0,) * length, prompt_len=length, blocks=blocks, state_slot=2, sampling=RowSampling()
    )
