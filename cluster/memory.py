"""A refusal of engines that do not fit in this machine's memory. Pure."""

from router.errors import ConfigError


def check_memory(
    *,
    kv_bytes: int,
    weight_bytes: int,
    working_bytes: int,
    ranks: int,
    available: int | None,
    where: str = "this machine",
) -> None:
    """Refuse an engine whose KV, weights and steps do not fit in the memory of a machine or a device.

    Args:
        kv_bytes: KV memory of one rank.
        weight_bytes: weights of all ranks together.
        working_bytes: rows, rotary tables and the largest step of one rank.
        ranks: ranks that run there.
        available: bytes that are free; None is not checked.
        where: what has them.

    Raises:
        ConfigError: names what is needed and what there is, and the option to lower.
    """
    fixed = weight_bytes + working_bytes * ranks
    needed = kv_bytes * ranks + fixed
    if available is None or needed <= available:
        return
    most = max(0, available - fixed) // ranks
    advice = f"lower kv_memory_bytes (--kv-memory) to at most {_size(most)}"
    raise ConfigError(
        f"kv_memory_bytes={kv_bytes} does not fit: {ranks} rank(s) with {_size(kv_bytes)} of KV and "
        f"{_size(working_bytes)} for rows and steps each, and {_size(weight_bytes)} of weights need {_size(needed)}, "
        f"{where} has {_size(available)} available; {advice if most else _smaller(weight_bytes, available)}"
    )


def _smaller(weight_bytes: int, available: int) -> str:
    """The remedy where not even an engine without KV would fit."""
    if weight_bytes >= available:
        return "use a larger machine"
    return "lower max_step_tokens, max_rows or max_model_len, or use a larger machine"


def _size(num_bytes: int) -> str:
    return f"{num_bytes} bytes ({num_bytes / (1 << 30):.2f} GiB)"
