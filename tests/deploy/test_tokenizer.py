"""Text to token ids and back, against the transformers tokenizer of the same checkpoint."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deploy.text_stream import TextStream
from deploy.tokenizer import TextTokenizer, load_tokenizer
from deploy.tokenizer_training import save_tokenizer, train_tokenizer
from router.errors import CheckpointError
from tests.support.serving import VOCAB_SIZE, make_tokenizer

TEXTS = ["", "def f(x):\n    return x", "caf\u00e9 \u4f60\u597d \U0001f600!", "<think>a</think><|im_end|>\n"]


def make_reference(folder: Path) -> PreTrainedTokenizerFast:
    save_tokenizer(train_tokenizer(VOCAB_SIZE), folder, model_max_length=256)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(reference, PreTrainedTokenizerFast)
    return reference


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_encoded_as_transformers_does(tmp_path: Path, text: str) -> None:
    assert list(make_tokenizer().encode(text)) == make_reference(tmp_path)(text)["input_ids"]


def test_tokens_decode_one_by_one_to_what_transformers_decodes_at_once(tmp_path: Path) -> None:
    reference = make_reference(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    draw = random.Random(0)
    for length in (1, 3, 50, 400):
        ids = [draw.randrange(VOCAB_SIZE) for _ in range(length)]
        stream = TextStream()
        text = "".join(stream.push(tokenizer.text_bytes(each)).text for each in ids) + stream.finish().text

        assert text == reference.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_special_tokens_have_no_text_but_thinking_and_tool_marks_do() -> None:
    tokenizer = make_tokenizer()

    assert tokenizer.decode(tokenizer.encode("a<|im_end|><think>b</tool_call>")) == "a<think>b</tool_call>"


def test_plain_encoding_makes_text_of_special_tokens() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode_plain("<|im_end|>")

    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_an_id_of_a_padded_vocabulary_has_no_text() -> None:
    assert make_tokenizer().token_bytes(VOCAB_SIZE + 5) == b""


def test_no_token_is_longer_than_the_bound() -> None:
    tokenizer = make_tokenizer()
    assert all(len(tokenizer.decode([each])) <= tokenizer.longest_token_chars for each in range(VOCAB_SIZE))


def test_a_folder_without_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="ascii")

    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    with pytest.raises(CheckpointError, match="must be ByteLevel"):
        TextTokenizer(Tokenizer(models.BPE()), make_tokenizer().template)
