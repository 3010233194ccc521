import pytest

from deploy.bench_scenarios import DEFAULT_SCENARIOS, parse_scenarios
from router.errors import ConfigError


def test_a_name_says_how_many_prompts_of_how_many_tokens_run_at_once() -> None:
    found = parse_scenarios("single, batch32,prefill2048,prefill4x1024,startup")
    assert [(each.kind, each.num_prompts, each.prompt_tokens, each.new_tokens) for each in found] == [
        ("decode", 1, 128, 128),
        ("decode", 32, 128, 128),
        ("prefill", 1, 2048, 1),
        ("prefill", 4, 1024, 1),
        ("startup", 1, 16, 1),
    ]
    assert len(parse_scenarios(DEFAULT_SCENARIOS)) == 7


@pytest.mark.parametrize("text", ["", "foo", "batch0", "batch", "prefill", "prefill0x8", "single,", "batch99999"])
def test_an_unknown_scenario_is_refused_with_the_known_forms(text: str) -> None:
    with pytest.raises(ConfigError, match="none of single, batchN"):
        parse_scenarios(text)
