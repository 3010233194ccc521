"""How fast KV and state move between two ranks, against a plain copy, a plain socket and plain gloo below it.

    python -m benchmarks.handoff [--tokens 4096] [--repeats 7] [--ways auto tcp p2p nixl]

The geometry is Qwen3-Next-80B's (12 attention layers of 2 KV heads of 256, 36 delta layers), bfloat16, blocks of 16.
The source is another process, of the plain ways too, whose bytes all lie in memory of their own as KV does: zeros
that were never written, or one frame sent again and again, come out of the caches. Each number is the best of the
repeats after one warm-up. `reader_cpu_ms` and `source_cpu_ms` are what each of the two processes computed a pull, which
a busy machine changes least. NIXL comes last: its sources compute all the time.
"""

import argparse
import json
import multiprocessing
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue

import numpy as np
import psutil
import torch
from torch.distributed import Store

from cluster.config import KvTransport
from cluster.handoff import Puller, source_rank
from cluster.kv_server import KvServer
from cluster.kv_wire import MAX_PAYLOAD_BYTES
from cluster.pair import READER, SOURCE, Pair, join_store, open_store
from cluster.plan import KvLayout, KvTicket, PullDone, PullOrder, SourceRank
from cluster.rank_memory import RankMemory
from cluster.transports import make_transports
from shards.cache import KvCache, cache_shape
from shards.config import ModelConfig
from shards.rope_config import RopeConfig

TOKEN = "benchmark-token-of-no-cluster"
BLOCK_SIZE = 16
NUM_SLOTS = 2
WAYS: tuple[KvTransport, ...] = ("auto", "tcp", "p2p", "nixl")
"""auto is shared memory on one host."""


def make_model() -> ModelConfig:
    """Qwen3-Next-80B-A3B's shape."""
    layer = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
    return ModelConfig(
        architecture="qwen3_next",
        attention_gated=True,
        zero_centred_norm=True,
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        intermediate_size=5120,
        moe_intermediate_size=512,
        num_experts=512,
        num_experts_per_tok=10,
        norm_topk_prob=True,
        layer_types=layer * 12,
        rope=RopeConfig(theta=1e7, rotary_dim=64),
        max_position_embeddings=262_144,
        shared_expert_intermediate_size=512,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
    )


def make_cache(tp: int, rank: int, num_blocks: int) -> KvCache:
    """A rank's cache."""
    shape = cache_shape(
        make_model(),
        tp,
        rank,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_slots=NUM_SLOTS,
        dtype=torch.bfloat16,
    )
    return KvCache(shape, "cpu")


def make_layout(tp: int, num_blocks: int) -> KvLayout:
    """The cache's geometry as tickets carry it."""
    return KvLayout(
        fingerprint=make_model().fingerprint(),
        tp=tp,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        num_slots=NUM_SLOTS,
        dtype="bfloat16",
    )


def serve(tp: int, num_blocks: int, pipe: Connection) -> None:
    """The source process: a lane of caches and their servers, until the pipe closes."""
    caches = [make_cache(tp, rank, num_blocks) for rank in range(tp)]
    servers = [KvServer(cache.buffer, TOKEN) for cache in caches]
    for cache in caches:
        cache.buffer.fill_(1)
    pipe.send([source_rank(cache, rank, servers[rank]) for rank, cache in enumerate(caches)])
    pipe.recv()


def best_s(work: Callable[[], None], repeats: int) -> float:
    """Shortest run after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def cpu_s(process: psutil.Process) -> float:
    """Seconds that a process has computed, itself and in the kernel."""
    times = process.cpu_times()
    return float(times.user + times.system)


def make_ticket(ranks: list[SourceRank], layout: KvLayout, blocks: tuple[int, ...]) -> KvTicket:
    """All of the source's blocks in some order, and a state."""
    return KvTicket(
        id="t",
        member_id="p",
        layout=layout,
        ranks=tuple(ranks),
        blocks=blocks,
        state_slot=0,
        num_tokens=len(blocks) * BLOCK_SIZE,
        expires_unix_s=time.time() + 60,
    )


def make_puller(cache: KvCache, num_blocks: int, way: KvTransport, on_done: Callable[[PullDone], None]) -> Puller:
    """Of a tp-1 member."""
    return Puller(
        cache,
        make_model(),
        make_layout(1, num_blocks),
        tp_rank=0,
        transports=make_transports(way, RankMemory(cache.buffer), TOKEN),
        on_done=on_done,
    )


def measure_pull(
    ranks: list[SourceRank], tp: int, num_blocks: int, *, scattered: bool, way: KvTransport, repeats: int
) -> dict[str, object]:
    """Pull all blocks and a slot into a tp-1 cache."""
    cache = make_cache(1, 0, num_blocks)
    layout = make_layout(tp, num_blocks)
    ended: SimpleQueue[PullDone] = SimpleQueue()
    puller = make_puller(cache, num_blocks, way, ended.put)
    blocks = tuple(range(num_blocks))
    order = tuple(int(block) for block in np.random.default_rng(0).permutation(num_blocks)) if scattered else blocks
    num_bytes = 0

    def pull() -> None:
        nonlocal num_bytes
        ticket = make_ticket(ranks, layout, order)
        puller.start(PullOrder(pull_id=0, ticket=ticket, lane=0, first=0, dst_blocks=blocks, dst_slot=1))
        done = ended.get()
        if done.error:
            raise RuntimeError(done.error)
        num_bytes = done.num_bytes

    # What pages of a new cache take to make is no part of a pull.
    cache.buffer.fill_(0)
    pull()
    processes = [psutil.Process(), psutil.Process(ranks[0].pid)]
    before = [cpu_s(process) for process in processes]
    seconds = best_s(pull, repeats)
    reader_s, source_s = (cpu_s(process) - was for process, was in zip(processes, before, strict=True))
    puller.close()
    cache.close()
    name = f"pull {'shm' if way == 'auto' else way} tp{tp}->tp1 {'scattered' if scattered else 'in order'}"
    return {
        "what": name,
        "bytes": num_bytes,
        "ms": seconds * 1e3,
        "gb_s": num_bytes / seconds / 1e9,
        "reader_cpu_ms": reader_s * 1e3 / (repeats + 1),
        "source_cpu_ms": source_s * 1e3 / (repeats + 1),
    }


def measure_copy(num_bytes: int, repeats: int) -> dict[str, object]:
    """One memcpy of as many bytes."""
    source, target = np.ones(num_bytes, dtype=np.uint8), np.zeros(num_bytes, dtype=np.uint8)
    seconds = best_s(lambda: np.copyto(target, source), repeats)
    return {"what": "memcpy", "bytes": num_bytes, "ms": seconds * 1e3, "gb_s": num_bytes / seconds / 1e9}


def send_socket(num_bytes: int, pipe: Connection) -> None:
    """The other process of `measure_socket`: all bytes whenever one comes, until the reader is gone."""
    data = np.ones(num_bytes, dtype=np.uint8).data
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        sock, _ = listener.accept()
    with sock:
        while sock.recv(1):
            sock.sendall(data)


def measure_socket(num_bytes: int, repeats: int) -> dict[str, object]:
    """As many bytes over loopback TCP, without frames, checksum or scatter."""
    child, port = start(send_socket, num_bytes)
    target = np.ones(num_bytes, dtype=np.uint8).data
    with socket.create_connection(("127.0.0.1", port)) as sock:

        def receive() -> None:
            sock.sendall(b"x")
            at = 0
            while at < num_bytes:
                at += sock.recv_into(target[at:])

        seconds = best_s(receive, repeats)
    child.join(10)
    return {"what": "socket", "bytes": num_bytes, "ms": seconds * 1e3, "gb_s": num_bytes / seconds / 1e9}


def raw_pair(store: Store, rank: int) -> Pair:
    """One end of the plain pair."""
    return Pair(store, "raw", rank=rank, host="127.0.0.1", device=torch.device("cpu"), timeout_s=10)


def send_gloo(num_frames: int, times: int, pipe: Connection) -> None:
    """The other process of `measure_gloo`: all frames, each as soon as the one before it is sent."""
    store = open_store("127.0.0.1")
    pipe.send(store.port)
    pair = raw_pair(store, SOURCE)
    data = torch.ones((num_frames, MAX_PAYLOAD_BYTES), dtype=torch.uint8)
    for _ in range(times):
        for frame in data:
            pair.finish(pair.start_send(frame), timeout_s=60)


def measure_gloo(num_bytes: int, repeats: int) -> dict[str, object]:
    """As many bytes over a pair, in frames as a pull has them, without checksum or scatter."""
    num_frames = -(-num_bytes // MAX_PAYLOAD_BYTES)
    child, port = start(send_gloo, num_frames, repeats + 1)
    pair = raw_pair(join_store("127.0.0.1", port, timeout_s=10), READER)
    target = torch.ones((num_frames, MAX_PAYLOAD_BYTES), dtype=torch.uint8)

    def receive() -> None:
        for frame in target:
            pair.finish(pair.start_receive(frame), timeout_s=60)

    seconds = best_s(receive, repeats)
    child.join(10)
    total = num_frames * MAX_PAYLOAD_BYTES
    return {"what": "gloo", "bytes": total, "ms": seconds * 1e3, "gb_s": total / seconds / 1e9}


def start(target: Callable[..., None], *args: object) -> tuple[BaseProcess, int]:
    """A process that sends, and the port that it says."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(*args, theirs), daemon=True)
    child.start()
    return child, ours.recv()


def measure_pulls(tp: int, num_blocks: int, ways: Sequence[KvTransport], repeats: int) -> int:
    """Print a JSON line a way and order of blocks -> bytes of a pull."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(tp, num_blocks, theirs), daemon=True)
    child.start()
    ranks, num_bytes = ours.recv(), 0
    for way in ways:
        for scattered in (False, True):
            result = measure_pull(ranks, tp, num_blocks, scattered=scattered, way=way, repeats=repeats)
            print(json.dumps(result), flush=True)
            num_bytes = int(str(result["bytes"]))
    ours.send(None)
    child.join(10)
    return num_bytes


def main() -> None:
    """Print one JSON line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="prompt length")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    args = parser.parse_args()
    num_blocks = args.tokens // BLOCK_SIZE
    plain = [way for way in args.ways if way != "nixl"]
    if plain:
        num_bytes = max(measure_pulls(tp, num_blocks, plain, args.repeats) for tp in (1, 2))
        for measure in (measure_copy, measure_socket, measure_gloo):
            print(json.dumps(measure(num_bytes, args.repeats)), flush=True)
    if "nixl" in args.ways:
        for tp in (1, 2):
            measure_pulls(tp, num_blocks, ["nixl"], args.repeats)


if __name__ == "__main__":
    main()
