"""The noise of (seed, position) is uniform, its neighbours do not know each other, and its values never change."""

from itertools import pairwise

from shards.noise import uniform


def test_values_are_frozen_because_requests_move_between_versions() -> None:
    assert uniform(0, 0) == 0.6524484863740322
    assert uniform(0, 1) == 0.7012121095215252
    assert uniform(1, 0) == 0.36818951565166946
    assert uniform(42, 1000) == 0.6952598398323256
    assert uniform(2**64 - 1, 7) == 0.7238582745899125
    assert uniform(123456789, 131071) == 0.6516528489722602


def test_a_negative_seed_is_taken_modulo_64_bits() -> None:
    assert uniform(-1, 7) == uniform(2**64 - 1, 7)


def _chi_square(values: list[float], bins: int) -> float:
    counts = [0] * bins
    for value in values:
        counts[int(value * bins)] += 1
    expected = len(values) / bins
    return sum((count - expected) ** 2 / expected for count in counts)


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    # 99.9% of chi-square with 63 degrees of freedom lies below 103.4; the inputs are fixed, so this never flickers.
    assert _chi_square([uniform(7, p) for p in range(20000)], 64) < 103.4
    assert _chi_square([uniform(s, 3) for s in range(20000)], 64) < 103.4
    assert all(0.0 <= uniform(s, p) < 1.0 for s in range(50) for p in range(50))


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    along = [uniform(11, p) for p in range(20001)]
    across = [uniform(s, 11) for s in range(20001)]
    for values in (along, across):
        pairs = [(int(a * 8) + b) / 8 for a, b in pairwise(values)]
        assert _chi_square(pairs, 64) < 103.4
        covariance = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(values)) / 20000
        assert abs(covariance * 12) < 0.025
    diagonal = [uniform(p, 20000 - p) for p in range(20000)]
    assert len(set(diagonal)) == 20000
