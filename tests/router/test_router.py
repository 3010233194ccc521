"""Routes follow load and cached prefixes, spread bursts, and never go to members that should get nothing."""

from collections import Counter

import pytest

from router.errors import ConfigError, NoMemberError
from router.load import MemberLoad
from router.prefix import block_hashes
from router.request import MemberId, Request, RequestId, Role, SamplingParams
from router.router import Router, RouterConfig

PROMPT = tuple(range(64))


def make_load(
    name: str,
    role: Role = "mixed",
    *,
    waiting_tokens: int = 0,
    cached: tuple[int, ...] = (),
    draining: bool = False,
    prefix_cache: bool = True,
) -> MemberLoad:
    return MemberLoad(
        member_id=MemberId(name),
        role=role,
        waiting_tokens=waiting_tokens,
        max_requests=64,
        free_blocks=1000,
        total_blocks=1000,
        prefix_cache=prefix_cache,
        prefix_digest=frozenset(block_hashes(cached, 16)),
        draining=draining,
    )


def make_request(number: int = 0, prompt: tuple[int, ...] = PROMPT) -> Request:
    return Request(id=RequestId(f"r{number}"), prompt_ids=prompt, sampling=SamplingParams(max_tokens=8))


def make_router(*loads: MemberLoad, config: RouterConfig | None = None) -> Router:
    router = Router(config)
    for load in loads:
        router.update(load)
    return router


def test_with_both_pools_a_request_gets_a_member_of_each() -> None:
    router = make_router(make_load("p", "prefill"), make_load("d", "decode"), make_load("m", "mixed"))
    route = router.route(make_request(), 0.0)
    assert (route.prefill, route.decode, route.cached_tokens) == ("p", "d", 0)


def test_a_prefill_pool_hands_to_a_mixed_member_where_there_is_no_decode_pool() -> None:
    router = make_router(make_load("p", "prefill"), make_load("m"))
    assert router.route(make_request(), 0.0).decode == "m"


def test_without_a_prefill_pool_a_mixed_member_serves_both_and_else_a_decode_member() -> None:
    router = make_router(make_load("m"), make_load("d", "decode"))
    route = router.route(make_request(), 0.0)
    assert (route.prefill, route.decode) == (None, "m")
    router.remove(MemberId("m"))
    route = router.route(make_request(), 0.0)
    assert (route.prefill, route.decode) == (None, "d")


def test_nobody_who_decodes_is_an_error() -> None:
    router = make_router(make_load("p", "prefill"))
    with pytest.raises(NoMemberError, match="no decode or mixed member"):
        router.route(make_request(), 0.0)


def test_draining_excluded_and_removed_members_get_nothing() -> None:
    router = make_router(make_load("a", draining=True), make_load("b"), make_load("c"), make_load("d"))
    router.remove(MemberId("d"))
    router.remove(MemberId("unknown"))
    for number in range(20):
        assert router.route(make_request(number), 0.0, exclude=frozenset({MemberId("c")})).decode == "b"
    assert {load.member_id for load in router.loads} == {"a", "b", "c"}


def test_the_member_with_less_to_do_is_chosen() -> None:
    router = make_router(make_load("busy", waiting_tokens=5000), make_load("free"))
    assert router.route(make_request(), 0.0).decode == "free"


def test_a_cached_prefix_attracts_until_the_queue_outweighs_it() -> None:
    prompt = tuple(range(4000))
    cached = make_load("cached", cached=prompt, waiting_tokens=1000)
    router = make_router(cached, make_load("free"))
    route = router.route(make_request(prompt=prompt), 0.0)
    # The block with the last token does not count: it must be computed.
    assert (route.decode, route.cached_tokens) == ("cached", 3984)
    router = make_router(make_load("cached", cached=prompt, waiting_tokens=9000), make_load("free"))
    assert router.route(make_request(prompt=prompt), 0.0).decode == "free"


def test_a_burst_spreads_before_the_next_report() -> None:
    router = make_router(*(make_load(f"m{index}") for index in range(4)))
    prompts = [tuple(range(number * 100, number * 100 + 64)) for number in range(40)]
    counts = Counter(router.route(make_request(n, prompt), 0.0).decode for n, prompt in enumerate(prompts))
    assert sorted(counts.values()) == [10, 10, 10, 10]


def test_what_was_routed_counts_until_the_second_report_or_for_its_time() -> None:
    loads = make_load("a"), make_load("b", waiting_tokens=100)
    router = make_router(*loads)
    long_prompt = tuple(range(1000, 3000))
    assert router.route(make_request(1, long_prompt), 0.0).decode == "a"
    router.update(loads[0])
    assert router.route(make_request(2), 0.0).decode == "b"
    router.update(loads[0])
    assert router.route(make_request(3, tuple(range(5000, 5064))), 0.0).decode == "a"
    router = make_router(*loads)
    assert router.route(make_request(1, long_prompt), 0.0).decode == "a"
    assert router.route(make_request(3), 2.5).decode == "a"


def test_a_routed_prompt_counts_as_cached_until_it_is_forgotten() -> None:
    router = make_router(make_load("a"), make_load("b"), config=RouterConfig(learned_s=10.0))
    prompt = tuple(range(2000))
    home = router.route(make_request(1, prompt), 0.0).decode
    again = router.route(make_request(2, prompt), 5.0)
    assert (again.decode, again.cached_tokens) == (home, 1984)
    assert router.route(make_request(3, prompt), 20.0).cached_tokens == 0


def test_a_report_that_confirms_a_prefix_outlives_the_memory_of_it() -> None:
    router = make_router(make_load("a"), config=RouterConfig(learned_s=10.0))
    router.route(make_request(1), 0.0)
    router.update(make_load("a", cached=PROMPT))
    assert router.route(make_request(2), 20.0).cached_tokens == 48
    router.update(make_load("a"))
    assert router.route(make_request(3), 20.0).cached_tokens == 0


def test_memory_of_prefixes_is_bounded_and_the_oldest_goes_first() -> None:
    router = make_router(make_load("a"), config=RouterConfig(max_learned=4))
    router.route(make_request(1), 0.0)
    router.route(make_request(2, tuple(range(100, 133))), 0.0)
    assert router.route(make_request(3, tuple(range(100, 133))), 0.0).cached_tokens == 32
    assert router.route(make_request(4), 0.0).cached_tokens == 0


def test_members_whose_prefix_cache_is_off_are_not_expected_to_cache() -> None:
    router = make_router(make_load("a", prefix_cache=False))
    router.route(make_request(1), 0.0)
    assert router.route(make_request(2), 0.0).cached_tokens == 0


def test_a_member_that_came_back_without_its_prefix_cache_is_not_expected_to_hit() -> None:
    router = make_router(make_load("a", cached=PROMPT))
    assert router.route(make_request(1), 0.0).cached_tokens > 0
    router.update(make_load("a", cached=PROMPT, prefix_cache=False))
    assert router.route(make_request(2), 0.0).cached_tokens == 0


def test_ties_are_broken_by_the_request_the_same_way_each_time_and_spread() -> None:
    def choose(number: int) -> MemberId:
        return make_router(make_load("a"), make_load("b"), make_load("c")).route(make_request(number), 0.0).decode

    first = [choose(number) for number in range(60)]
    assert first == [choose(number) for number in range(60)]
    assert min(Counter(first).values()) >= 10


def test_a_memory_without_length_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router\.recent_s"):
        RouterConfig(recent_s=0.0)
