"""Routes follow load and cached prefixes, spread bursts, and never go to members that should get nothing."""

from collections import Counter
from dataclasses import replace

import pytest

from router.errors import ConfigError, NoMemberError
from router.load import CacheEvents, MemberLoad
from router.prefix import block_hashes
from router.prompt import Prompt, prompt_of
from router.request import MemberId, Request, RequestId, Role, SamplingParams
from router.router import Router, RouterConfig

PROMPT = tuple(range(64))


def make_load(
    name: str,
    role: Role = "mixed",
    *,
    waiting_tokens: int = 0,
    draining: bool = False,
    prefix_cache: bool = True,
    block_size: int = 16,
) -> MemberLoad:
    return MemberLoad(
        member_id=MemberId(name),
        role=role,
        waiting_tokens=waiting_tokens,
        max_requests=64,
        block_size=block_size,
        free_blocks=1000,
        total_blocks=1000,
        prefix_cache=prefix_cache,
        draining=draining,
    )


def make_prompt(number: int = 0, prompt: tuple[int, ...] = PROMPT) -> Prompt:
    sampling = SamplingParams(max_tokens=8)
    return prompt_of(Request(id=RequestId(f"r{number}"), prompt_ids=prompt, sampling=sampling))


def make_router(*loads: MemberLoad, config: RouterConfig | None = None) -> Router:
    router = Router(config)
    for load in loads:
        router.update(load, 0.0)
    return router


def hold(router: Router, name: str, tokens: tuple[int, ...], *, after: int = 0, block_size: int = 16) -> None:
    """The member's cache holds this and nothing else."""
    hashes = tuple(block_hashes(tokens, block_size))
    events = CacheEvents(after=after, sequence=after + 1, cleared=True, stored=hashes)
    assert router.take_events(MemberId(name), events)


def test_with_both_pools_a_request_gets_a_member_of_each() -> None:
    router = make_router(make_load("p", "prefill"), make_load("d", "decode"), make_load("m", "mixed"))
    route = router.route(make_prompt(), 0.0)
    assert (route.prefill, route.decode, route.cached_tokens) == ("p", "d", 0)


def test_a_prefill_pool_hands_to_a_mixed_member_where_there_is_no_decode_pool() -> None:
    router = make_router(make_load("p", "prefill"), make_load("m"))
    assert router.route(make_prompt(), 0.0).decode == "m"


def test_without_a_prefill_pool_a_mixed_member_serves_both_and_else_a_decode_member() -> None:
    router = make_router(make_load("m"), make_load("d", "decode"))
    route = router.route(make_prompt(), 0.0)
    assert (route.prefill, route.decode) == (None, "m")
    router.remove(MemberId("m"))
    route = router.route(make_prompt(), 0.0)
    assert (route.prefill, route.decode) == (None, "d")


def test_nobody_who_decodes_is_an_error() -> None:
    router = make_router(make_load("p", "prefill"))
    with pytest.raises(NoMemberError, match="no decode or mixed member"):
        router.route(make_prompt(), 0.0)


def test_draining_excluded_and_removed_members_get_nothing() -> None:
    router = make_router(make_load("a", draining=True), make_load("b"), make_load("c"), make_load("d"))
    router.remove(MemberId("d"))
    router.remove(MemberId("unknown"))
    for number in range(20):
        assert router.route(make_prompt(number), 0.0, exclude=frozenset({MemberId("c")})).decode == "b"
    assert {load.member_id for load in router.loads} == {"a", "b", "c"}


def test_the_member_with_less_to_do_is_chosen() -> None:
    router = make_router(make_load("busy", waiting_tokens=5000), make_load("free"))
    assert router.route(make_prompt(), 0.0).decode == "free"


def test_a_cached_prefix_attracts_until_the_queue_outweighs_it() -> None:
    prompt = tuple(range(4000))
    router = make_router(make_load("cached", waiting_tokens=1000), make_load("free"))
    hold(router, "cached", prompt)
    route = router.route(make_prompt(prompt=prompt), 0.0)
    # The block with the last token does not count: it must be computed.
    assert (route.decode, route.cached_tokens) == ("cached", 3984)
    router = make_router(make_load("cached", waiting_tokens=90_000), make_load("free"))
    hold(router, "cached", prompt)
    assert router.route(make_prompt(prompt=prompt), 0.0).decode == "free"


def test_a_burst_spreads_before_the_next_report() -> None:
    router = make_router(*(make_load(f"m{index}") for index in range(4)))
    prompts = [tuple(range(number * 100, number * 100 + 64)) for number in range(40)]
    counts = Counter(router.route(make_prompt(n, prompt), 0.0).decode for n, prompt in enumerate(prompts))
    assert sorted(counts.values()) == [10, 10, 10, 10]


def test_what_was_routed_counts_until_the_second_report_or_for_its_time() -> None:
    loads = make_load("a"), make_load("b", waiting_tokens=100)
    router = make_router(*loads)
    long_prompt = tuple(range(1000, 3000))
    assert router.route(make_prompt(1, long_prompt), 0.0).decode == "a"
    router.update(loads[0], 0.0)
    assert router.route(make_prompt(2), 0.0).decode == "b"
    router.update(loads[0], 0.0)
    assert router.route(make_prompt(3, tuple(range(5000, 5064))), 0.0).decode == "a"
    router = make_router(*loads)
    assert router.route(make_prompt(1, long_prompt), 0.0).decode == "a"
    assert router.route(make_prompt(3), 2.5).decode == "a"


def test_a_prompt_that_is_computed_leaves_its_place_before_the_member_reports_it() -> None:
    router = make_router(make_load("a"), make_load("b", waiting_tokens=100))
    long_prompt = tuple(range(1000, 3000))
    assert router.route(make_prompt(1, long_prompt), 0.0).decode == "a"
    router.started(MemberId("a"), "another")
    router.started(MemberId("nobody"), "r1")
    assert router.route(make_prompt(2), 0.0).decode == "b"
    router.started(MemberId("a"), "r1")
    router.started(MemberId("a"), "r1")
    assert router.route(make_prompt(3, tuple(range(5000, 5064))), 0.0).decode == "a"


def test_the_backlog_is_of_those_who_compute_prompts_with_what_was_routed_since() -> None:
    router = make_router(make_load("d", "decode", waiting_tokens=30), make_load("m", waiting_tokens=7))
    assert router.backlog_tokens == 37
    router.update(make_load("p", "prefill", waiting_tokens=5), 0.0)
    router.update(make_load("q", "prefill", waiting_tokens=500, draining=True), 0.0)
    router.route(make_prompt(1), 0.0)
    assert router.backlog_tokens == 5 + 64
    router.started(MemberId("p"), "r1")
    assert router.backlog_tokens == 5


def test_a_routed_prompt_counts_as_cached_until_it_is_forgotten() -> None:
    router = make_router(make_load("a"), make_load("b"), config=RouterConfig(expected_s=10.0))
    prompt = tuple(range(2000))
    home = router.route(make_prompt(1, prompt), 0.0).decode
    again = router.route(make_prompt(2, prompt), 5.0)
    assert (again.decode, again.cached_tokens) == (home, 1984)
    assert router.route(make_prompt(3, prompt), 20.0).cached_tokens == 0


def test_what_a_member_says_of_its_cache_outlives_the_expectation() -> None:
    router = make_router(make_load("a"), config=RouterConfig(expected_s=10.0))
    router.route(make_prompt(1), 0.0)
    hold(router, "a", PROMPT)
    assert router.route(make_prompt(2), 20.0).cached_tokens == 48
    hold(router, "a", ())
    assert router.route(make_prompt(3), 20.0).cached_tokens == 0


def test_cache_events_behind_a_gap_are_not_taken_until_a_snapshot_comes() -> None:
    router = make_router(make_load("a"))
    first, second, third = block_hashes(PROMPT[:48], 16)
    member = MemberId("a")
    assert not router.take_events(member, CacheEvents(after=0, sequence=1, stored=(first,)))
    assert router.take_events(member, CacheEvents(after=4, sequence=4, cleared=True, stored=(first,)))
    assert router.take_events(member, CacheEvents(after=4, sequence=5, stored=(second, third)))
    assert not router.take_events(member, CacheEvents(after=6, sequence=7, removed=(first,)))
    assert router.route(make_prompt(1), 0.0).cached_tokens == 48
    assert router.take_events(member, CacheEvents(after=5, sequence=6, removed=(third,)))
    assert not router.take_events(MemberId("nobody"), CacheEvents(after=0, sequence=0, cleared=True))


def test_memory_of_routed_prompts_is_bounded_and_the_oldest_goes_first() -> None:
    router = make_router(make_load("a"), config=RouterConfig(max_expected=4))
    router.route(make_prompt(1), 0.0)
    router.route(make_prompt(2, tuple(range(100, 133))), 0.0)
    assert router.route(make_prompt(3, tuple(range(100, 133))), 0.0).cached_tokens == 32
    assert router.route(make_prompt(4), 0.0).cached_tokens == 0


def test_what_is_cached_takes_room_too_while_it_is_used() -> None:
    full = [replace(make_load(name), free_blocks=5, total_blocks=6, running_requests=1) for name in ("a", "b")]
    router = make_router(*full)
    hold(router, "a", PROMPT)
    chosen = [router.route(make_prompt(number), 0.0).decode for number in range(4)]
    assert set(chosen) == {"a", "b"}


def test_members_whose_prefix_cache_is_off_are_not_expected_to_cache() -> None:
    router = make_router(make_load("a", prefix_cache=False))
    router.route(make_prompt(1), 0.0)
    assert router.route(make_prompt(2), 0.0).cached_tokens == 0


def test_a_member_of_another_role_keeps_its_cache() -> None:
    router = make_router(make_load("a"), make_load("b", "decode"))
    hold(router, "a", PROMPT)
    router.update(make_load("a", "prefill"), 1.0)
    route = router.route(make_prompt(), 1.0)
    assert (route.prefill, route.cached_tokens) == ("a", 48)
    removed = tuple(block_hashes(PROMPT, 16))
    assert router.take_events(MemberId("a"), CacheEvents(after=1, sequence=2, removed=removed))
    assert router.route(make_prompt(1), 99.0).cached_tokens == 0


def test_a_member_of_another_role_that_never_told_of_its_cache_is_asked_for_it() -> None:
    router = make_router(make_load("a"))
    router.update(make_load("a", "decode"), 1.0)
    assert not router.take_events(MemberId("a"), CacheEvents(after=1, sequence=2, stored=(7,)))


def test_a_member_that_came_back_with_other_blocks_begins_anew() -> None:
    router = make_router(make_load("a"), make_load("b", "decode"))
    hold(router, "a", PROMPT)
    router.update(make_load("a", "prefill", block_size=8), 0.0)
    route = router.route(make_prompt(1), 0.0)
    assert (route.prefill, route.decode, route.cached_tokens) == ("a", "b", 0)
    assert not router.take_events(MemberId("a"), CacheEvents(after=1, sequence=2, stored=(7,)))


def test_members_of_different_block_sizes_are_compared() -> None:
    router = make_router(make_load("small", block_size=8), make_load("large", block_size=32))
    assert router.block_sizes == {8, 32}
    hold(router, "small", PROMPT, block_size=8)
    assert router.route(make_prompt(1), 0.0).cached_tokens == 56
    hold(router, "large", PROMPT, block_size=32)
    hold(router, "small", ())
    assert router.route(make_prompt(2), 3.0).decode == "large"


def test_many_holders_among_more_others_are_all_known() -> None:
    names = [f"m{index}" for index in range(80)]
    router = make_router(*(make_load(name) for name in names))
    for name in names[1::2][:39]:
        hold(router, name, PROMPT)
    chosen = [router.route(make_prompt(number), 0.0) for number in range(39)]
    assert {route.cached_tokens for route in chosen} == {48}
    assert {route.decode for route in chosen} == set(names[1::2][:39])


def test_ties_are_broken_by_the_request_the_same_way_each_time_and_spread() -> None:
    def choose(number: int) -> MemberId:
        return make_router(make_load("a"), make_load("b"), make_load("c")).route(make_prompt(number), 0.0).decode

    first = [choose(number) for number in range(60)]
    assert first == [choose(number) for number in range(60)]
    assert min(Counter(first).values()) >= 10


def test_a_place_left_by_a_member_is_taken_by_the_next() -> None:
    router = make_router(make_load("a"), make_load("b", waiting_tokens=9000))
    hold(router, "a", PROMPT)
    router.route(make_prompt(0), 0.0)
    router.remove(MemberId("a"))
    router.update(make_load("c"), 0.0)
    route = router.route(make_prompt(1), 5.0)
    assert (route.decode, route.cached_tokens) == ("c", 0)


def test_a_mixed_member_serves_alone_where_handing_over_costs_more() -> None:
    loads = make_load("p", "prefill"), make_load("d", "decode"), make_load("m")
    router = make_router(*(replace(load, state_bytes=10**9) for load in loads))
    route = router.route(make_prompt(), 0.0)
    assert (route.prefill, route.decode) == (None, "m")
    assert route.cost_s < 1.0


def test_members_with_recurrent_state_are_expected_to_hit_where_a_state_is_kept() -> None:
    router = make_router(replace(make_load("a"), total_state_slots=9, free_state_slots=9))
    hashes = block_hashes(PROMPT, 16)
    events = CacheEvents(after=0, sequence=1, cleared=True, stored=tuple(hashes), stored_states=(hashes[1],))
    assert router.take_events(MemberId("a"), events)
    assert router.route(make_prompt(1), 0.0).cached_tokens == 32


def test_many_different_sets_of_holders_do_not_pile_up() -> None:
    router = make_router(*(make_load(f"m{index}") for index in range(14)))
    tokens = [tuple(range(number * 100, number * 100 + 17)) for number in range(5000)]
    hashes = [block_hashes(each, 16)[0] for each in tokens]
    for index in range(14):
        stored = tuple(value for number, value in enumerate(hashes) if number >> index & 1)
        router.take_events(MemberId(f"m{index}"), CacheEvents(after=0, sequence=1, cleared=True, stored=stored))
    for number in range(1, 5000):
        assert router.route(make_prompt(number, tokens[number]), 3.0 * number).cached_tokens == 16


def test_a_memory_without_length_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router\.recent_s"):
        RouterConfig(recent_s=0.0)
