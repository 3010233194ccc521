"""Dense Qwen3: what its config.json means."""

from shards.config import ModelConfig
from shards.config_fields import Fields
from shards.family import Family, read_block, with_attention_bias, with_dense_layers


def _read(fields: Fields) -> ModelConfig:
    # transformers gives heads of 128 where the config has none, whatever hidden_size is.
    config = with_attention_bias(fields, read_block(fields, "qwen3", default_head_dim=128))
    return with_dense_layers(fields, config)


FAMILY = Family(read=_read, parts=(), published={"architectures": ["Qwen3ForCausalLM"], "rope_theta": 1000000.0})
