"""The tree of expected prompts tells what a look at every prompt would tell, and forgets all of it in the end."""

import random
from collections import deque

from router.expected import ExpectedPrefixes


def make_prompts(rng: random.Random, count: int) -> list[tuple[int, ...]]:
    """Prompts that go on with one another, as chained hashes do."""
    prompts: list[tuple[int, ...]] = [(1, 2, 3, 4, 5, 6, 7, 8)]
    for _ in range(count):
        begin = rng.choice(prompts)
        fresh = tuple(rng.getrandbits(60) for _ in range(rng.randrange(12)))
        prompts.append(begin[: rng.randrange(len(begin) + 1)] + fresh)
    return prompts


def agreed(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(1 for left, right in zip(one, other, strict=False) if left == right)


def test_random_prompts_are_found_by_the_tree_as_by_comparing_each() -> None:
    rng = random.Random(3)
    for _ in range(30):
        tree = ExpectedPrefixes(max_blocks=10**6)
        live: deque[tuple[float, int, tuple[int, ...]]] = deque()
        for now, prompt in enumerate(make_prompts(rng, 80)):
            tree.forget(float(now))
            while live and live[0][0] <= now:
                live.popleft()
            members = rng.sample(range(5), rng.randrange(1, 3))
            tree.add(members, prompt, now + 30.0)
            live += [(now + 30.0, member, prompt) for member in members]
            if rng.random() < 0.05:
                gone = rng.randrange(5)
                tree.leave(gone)
                live = deque(each for each in live if each[1] != gone)
            asked = rng.choice(live)[2] if live else prompt
            found = {
                member: max(depth for depth, members in tree.depths(asked) if members >> member & 1)
                for member in range(5)
                if any(members >> member & 1 for _, members in tree.depths(asked))
            }
            wanted = {
                member: max(agreed(asked, each) for _, other, each in live if other == member) for _, member, _ in live
            }
            assert found == {member: depth for member, depth in wanted.items() if depth}
            ends: dict[int, int] = {}
            for _, member, each in live:
                if each and agreed(asked, each) == len(each):
                    ends[len(each)] = ends.get(len(each), 0) | 1 << member
            assert tree.ends(asked) == ends


def test_what_is_forgotten_leaves_nothing_behind() -> None:
    rng = random.Random(4)
    tree = ExpectedPrefixes(max_blocks=10**6)
    prompts = [each for each in make_prompts(rng, 50) if each]
    for number, prompt in enumerate(prompts):
        tree.add((number % 3,), prompt, float(number))
    tree.forget(float(len(prompts)))
    assert all(tree.depths(prompt) == [] and tree.ends(prompt) == {} for prompt in prompts)


def test_the_oldest_prompts_are_forgotten_for_room() -> None:
    tree = ExpectedPrefixes(max_blocks=5)
    tree.add((0,), (1, 2, 3), 9.0)
    tree.add((1,), (1, 2, 4), 9.0)
    tree.forget(0.0)
    assert tree.depths((1, 2, 3)) == [(2, 0b10)]
    tree.add((2,), (), 9.0)
    assert tree.depths(()) == []


def test_room_is_counted_once_for_all_whom_a_prompt_is_sent_to_until_the_last_of_them_left() -> None:
    tree = ExpectedPrefixes(max_blocks=5)
    tree.add((0, 1), (1, 2, 3), 9.0)
    tree.leave(0)
    assert tree.depths((1, 2, 3)) == [(3, 0b10)]
    tree.add((2,), (4, 5), 9.0)
    tree.forget(0.0)
    assert tree.depths((1, 2, 3)) == [(3, 0b10)]
    tree.leave(1)
    tree.add((2,), (6, 7, 8), 9.0)
    tree.forget(0.0)
    assert (tree.depths((1, 2, 3)), tree.depths((4, 5))) == ([], [(2, 0b100)])
