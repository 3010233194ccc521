"""A refusal of engines whose KV and weights do not fit in this machine's memory. Pure."""

from router.errors import ConfigError


def check_memory(*, kv_bytes: int, weight_bytes: int, ranks: int, available: int | None) -> None:
    """Refuse an engine whose KV and weights do not fit in this machine's memory.

    Args:
        kv_bytes: KV memory of one rank.
        weight_bytes: weights of all ranks together.
        ranks: ranks that run on this machine.
        available: from `shards.host_memory.available_memory`; None is not checked.

    Raises:
        ConfigError: names what is needed and what there is, and the option to lower.
    """
    needed = kv_bytes * ranks + weight_bytes
    if available is None or needed <= available:
        return
    most = max(0, available - weight_bytes) // ranks
    advice = f"lower kv_memory_bytes (--kv-memory) to at most {_size(most)}" if most else "use a larger machine"
    raise ConfigError(
        f"kv_memory_bytes={kv_bytes} does not fit: {ranks} rank(s) with {_size(kv_bytes)} of KV each and "
        f"{_size(weight_bytes)} of weights need {_size(needed)}, this machine has {_size(available)} available; "
        f"{advice}"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes} bytes ({num_bytes / (1 << 30):.2f} GiB)"
