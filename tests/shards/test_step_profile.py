import time

import torch

from shards.comm import Comms
from shards.kernels.torch_kernels import TorchKernels
from shards.step_profile import OTHER, StepProfile, part


def test_parts_of_a_step_do_not_overlap_and_the_rest_is_other() -> None:
    profile = StepProfile()
    profile.begin("decode")
    with profile.part("head"), profile.part("linear"):
        time.sleep(0.002)
    time.sleep(0.002)
    with profile.part("sampling"):
        pass
    assert profile.steps == {"decode": 1}
    assert profile.seconds.keys() == {("decode", "head"), ("decode", OTHER), ("decode", "sampling")}
    assert profile.seconds["decode", "head"] >= 0.002
    assert profile.seconds["decode", OTHER] >= 0.002


def test_time_belongs_to_the_kind_of_step_that_began_last() -> None:
    profile = StepProfile()
    for kind in ("prefill", "decode", "decode"):
        profile.begin("prefill" if kind == "prefill" else "decode")
        with profile.part("rows"):
            pass
    assert profile.steps == {"prefill": 1, "decode": 2}
    profile.reset()
    assert (profile.steps, profile.seconds) == ({}, {})


def test_timed_operators_are_parts_and_attributes_pass_through() -> None:
    profile = StepProfile()
    kernels = profile.timed_kernels(TorchKernels())
    assert kernels.name == "torch"

    out = kernels.silu_mul(torch.ones(2, 4))
    assert torch.equal(out, TorchKernels().silu_mul(torch.ones(2, 4)))
    assert ("prefill", "silu_mul") in profile.seconds


def test_groups_of_one_rank_are_not_timed() -> None:
    comms = Comms.local()
    assert StepProfile().timed_comms(comms).tp is comms.tp


def test_without_a_profile_a_part_does_nothing() -> None:
    with part(None, "head"):
        pass
