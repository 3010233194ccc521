import pytest

from cluster.memory import check_memory
from router.errors import ConfigError

GIB = 1 << 30


def test_machine_that_tells_nothing_is_not_checked() -> None:
    check_memory(kv_bytes=1 << 60, weight_bytes=0, working_bytes=0, ranks=1, available=None)


def test_kv_that_does_not_fit_is_refused_with_bytes_option_and_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(kv_bytes=3 * GIB, weight_bytes=GIB, working_bytes=GIB // 2, ranks=2, available=4 * GIB)
    message = str(caught.value)
    assert f"kv_memory_bytes={3 * GIB}" in message
    assert "(8.00 GiB)" in message
    assert f"--kv-memory) to at most {GIB} bytes (1.00 GiB)" in message


def test_weights_that_do_not_fit_have_another_remedy() -> None:
    with pytest.raises(ConfigError, match="use a larger machine"):
        check_memory(kv_bytes=1, weight_bytes=2 * GIB, working_bytes=0, ranks=1, available=GIB)


def test_what_fits_is_let_through() -> None:
    check_memory(kv_bytes=GIB, weight_bytes=GIB // 2, working_bytes=GIB // 4, ranks=2, available=3 * GIB)


def test_steps_that_do_not_fit_beside_the_weights_have_their_own_remedy() -> None:
    with pytest.raises(ConfigError, match="lower max_step_tokens, max_rows or max_model_len"):
        check_memory(kv_bytes=1, weight_bytes=GIB // 2, working_bytes=GIB, ranks=1, available=GIB)
