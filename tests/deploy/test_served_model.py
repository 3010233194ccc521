"""What the gateway reads of a checkpoint."""

import json
from pathlib import Path

import pytest

from deploy.served_model import load_served_model
from router.errors import CheckpointError

CONFIG: dict[str, object] = {"max_position_embeddings": 64, "vocab_size": 512, "eos_token_id": 1}


def make_folder(folder: Path, config: object = CONFIG, generation: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def test_both_files_give_end_tokens_and_the_second_gives_sampling(tmp_path: Path) -> None:
    generation = {"eos_token_id": [2, 1], "temperature": 0.6, "top_k": 20, "max_new_tokens": 9}
    model = load_served_model(make_folder(tmp_path, generation=generation), name="tiny")

    assert (model.max_model_len, model.vocab_size, model.eos_token_ids) == (64, 512, (1, 2))
    assert (model.defaults.temperature, model.defaults.top_k, model.defaults.max_tokens) == (0.6, 20, 9)
    assert (model.defaults.top_p, model.defaults.repetition_penalty) == (1.0, 1.0)


def test_text_section_of_a_multimodal_config_is_what_counts(tmp_path: Path) -> None:
    around = {"model_type": "x", "eos_token_id": 9, "text_config": {**CONFIG, "eos_token_id": 3}}
    model = load_served_model(make_folder(tmp_path, around), name="tiny")

    assert (model.max_model_len, model.vocab_size, model.eos_token_ids) == (64, 512, (3,))


def test_do_sample_false_means_greedy(tmp_path: Path) -> None:
    generation = {"do_sample": False, "temperature": 0.6}
    assert load_served_model(make_folder(tmp_path, generation=generation), name="tiny").defaults.temperature == 0.0


def test_the_context_is_what_the_engines_take_also_where_yarn_makes_it_longer(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, CONFIG | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    for taken in (32, 256):
        assert load_served_model(folder, name="tiny", max_model_len=taken).max_model_len == taken


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({**CONFIG, "vocab_size": "many"}, None, r"config\.json: vocab_size .* 'many'"),
        ({"vocab_size": 3}, None, "max_position_embeddings"),
        ([], None, "JSON object"),
        ({**CONFIG, "eos_token_id": "x"}, None, "eos_token_id"),
        (CONFIG, {"temperature": "hot"}, r"generation_config\.json: temperature"),
        (CONFIG, {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_file_and_name(
    tmp_path: Path, config: object, generation: object, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_served_model(make_folder(tmp_path, config, generation), name="tiny")


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_served_model(tmp_path, name="tiny")
    (tmp_path / "config.json").write_text("{", encoding="ascii")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_served_model(tmp_path, name="tiny")
