import torch

from shards.cache import KvCache, cache_shape
from shards.states import dequantise, quantise
from tests.support.model_configs import make_next_config


def test_no_number_is_off_by_more_than_half_a_step_of_its_row() -> None:
    states = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 8).view(8, 1)
    kept, scales = quantise(states)
    assert (kept.dtype, kept.shape, scales.shape) == (torch.int8, states.shape, states.shape[:-1])
    error = (dequantise(kept, scales) - states).abs()
    assert bool((error <= scales.unsqueeze(-1) * 0.5001).all())
    assert kept.abs().amax().item() == 127


def test_zeros_stay_zeros_and_what_is_kept_twice_stays_as_it_was() -> None:
    states = torch.zeros(2, 3)
    states[1] = torch.tensor([1.0, -0.3, 0.01])
    once = dequantise(*quantise(states))
    assert once[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(dequantise(*quantise(once)), once, rtol=1e-6, atol=0)


def test_a_row_that_is_not_finite_does_not_become_so() -> None:
    states = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [1.0, 2.0]])
    back = dequantise(*quantise(states))
    assert not back[0].isfinite().any()
    assert not back[1].isfinite().all()
    assert back[2].isfinite().all()


def test_a_state_kept_in_int8_comes_back_into_another_slot_and_what_the_convolution_holds_is_exact() -> None:
    shape = cache_shape(
        make_next_config(), 1, 0, num_blocks=1, block_size=16, num_slots=3, num_int8=2, dtype=torch.bfloat16
    )
    cache = KvCache(shape, "cpu")
    noise = torch.Generator().manual_seed(2)
    for pool in (*cache.conv_states, *cache.delta_states):
        pool.copy_(torch.randn(pool.shape, generator=noise))
    before = [pool[:2].clone() for pool in cache.delta_states]

    cache.keep_states([0], [1])
    cache.restore_states([1], [2])

    for conv, delta, old in zip(cache.conv_states, cache.delta_states, before, strict=True):
        assert torch.equal(conv[2], conv[0])
        assert torch.equal(delta[:2], old)
        assert torch.equal(delta[2], dequantise(*quantise(old[0])))
        assert not torch.equal(delta[2], old[0])
    cache.close()
