import time

import numpy as np
import pytest
import torch

from shards.comm import Comms
from shards.kernels.torch_kernels import TorchKernels
from shards.mesh import Layout, Place
from shards.step_profile import StepProfile, part
from tests.support.thread_comm import on_every_rank


def test_a_part_is_told_without_the_parts_inside_of_it_and_all_add_up() -> None:
    profile = StepProfile()
    profile.begin("decode")
    with profile.part("inputs"):
        started = time.perf_counter()
    with profile.part("attention"):
        time.sleep(0.002)
        with profile.part("linear"):
            time.sleep(0.002)
    time.sleep(0.002)
    with profile.part("sampling"):
        passed = time.perf_counter() - started
    assert profile.steps == {"decode": 1}
    labels = {label for _, label in profile.seconds}
    assert labels == {("inputs",), ("attention",), ("attention", "linear"), ("sampling",), ()}
    assert all(profile.seconds["decode", label] >= 0.002 for label in (("attention",), ("attention", "linear"), ()))
    assert sum(profile.seconds.values()) == pytest.approx(passed, abs=1e-3)


def test_time_belongs_to_the_kind_of_step_that_began_last() -> None:
    profile = StepProfile()
    for kind in ("prefill", "decode", "decode"):
        profile.begin("prefill" if kind == "prefill" else "decode")
        with profile.part("inputs"):
            pass
    assert profile.steps == {"prefill": 1, "decode": 2}
    profile.reset()
    assert (profile.steps, profile.seconds) == ({}, {})


def test_calls_that_were_timed_elsewhere_are_taken_off_the_part_that_made_them() -> None:
    profile = StepProfile()
    profile.begin("decode")
    with profile.part("tape"):
        time.sleep(0.003)
        profile.add_calls([("attention", "linear"), ("head",), ("head",)], np.array([1_000_000, 500_000, 500_000]))
    assert profile.seconds["decode", ("attention", "linear")] == pytest.approx(0.001)
    assert profile.seconds["decode", ("head",)] == pytest.approx(0.001)
    assert 0.001 <= profile.seconds["decode", ("tape",)] < 0.1


def test_timed_operators_are_parts_and_attributes_pass_through() -> None:
    profile = StepProfile()
    kernels = profile.timed_kernels(TorchKernels())
    assert kernels.name == "torch"
    with profile.part("mlp"):
        out = kernels.silu_mul(torch.ones(2, 4))
    assert torch.equal(out, TorchKernels().silu_mul(torch.ones(2, 4)))
    assert ("prefill", ("mlp", "silu_mul")) in profile.seconds


def test_collectives_are_a_part_of_their_own_wherever_they_run() -> None:
    def work(_: Place, comms: Comms) -> set[tuple[str, ...]]:
        profile = StepProfile()
        with profile.part("attention"):
            profile.timed_comms(comms).world.all_reduce(torch.ones(3))
        return {label for _, label in profile.seconds}

    for labels in on_every_rank(Layout(tp=2), work):
        assert ("collectives", "all_reduce") in labels
        assert ("attention",) in labels


def test_groups_of_one_rank_are_not_timed() -> None:
    comms = Comms.local()
    assert StepProfile().timed_comms(comms).tp is comms.tp


def test_without_a_profile_a_part_does_nothing() -> None:
    with part(None, "head"):
        pass
