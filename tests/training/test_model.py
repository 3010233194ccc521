"""The model that is trained computes what transformers computes from its checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy.tokenizer_training import save_tokenizer, train_tokenizer
from training.checkpoint import export, load
from training.configs import FAMILIES, Family, config_fields, model_config
from training.layers import CHUNK
from training.model import Model


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of a family as a checkpoint."""
    family: Family = request.param
    folder = tmp_path_factory.mktemp(family)
    torch.manual_seed(0)
    save_tokenizer(train_tokenizer(400, ["one two three"]), folder, model_max_length=64)
    export(Model(model_config(family)), config_fields(family), folder)
    return folder


@torch.no_grad()
def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    tokens_BT = torch.randint(0, 1024, (3, 4 * CHUNK), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    ours = load(checkpoint)(tokens_BT).logits_BTV

    torch.testing.assert_close(ours, reference(tokens_BT).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_output_depends_on_a_later_token() -> None:
    model = Model(model_config("qwen3_next"))
    tokens_BT = torch.randint(0, 1024, (1, 2 * CHUNK), generator=torch.Generator().manual_seed(1))
    changed = tokens_BT.clone()
    changed[0, 20] += 1

    before, after = model(tokens_BT), model(changed)

    torch.testing.assert_close(before.logits_BTV[:, :20], after.logits_BTV[:, :20])
    assert before.mtp_logits_BTV is not None
    assert after.mtp_logits_BTV is not None
    # The head sees one token more.
    torch.testing.assert_close(before.mtp_logits_BTV[:, :19], after.mtp_logits_BTV[:, :19])
    assert not torch.allclose(before.mtp_logits_BTV[:, 19], after.mtp_logits_BTV[:, 19])
