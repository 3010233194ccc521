"""The model of one rank: embedding, decoder layers, final norm, head. Parameters carry their checkpoint names.

T tokens of the step, C hidden size, N rows whose logits are wanted, V vocabulary.
"""

from dataclasses import dataclass
from typing import assert_never

from torch import Tensor

from shards.attention import Attention
from shards.cache import KvCache
from shards.delta import Delta
from shards.embedding import VocabShard
from shards.linear import DenseMlp, Runtime
from shards.loading import Loader
from shards.moe import Moe
from shards.mtp import Mtp
from shards.rows import StepTensors
from shards.verify import Replay


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Pre-norm residual block: token mixer, then MLP."""

    input_layernorm_C: Tensor
    mixer: Attention | Delta
    mixer_index: int
    """Which of the cache's attention (or delta) layers this is."""
    post_attention_layernorm_C: Tensor
    mlp: DenseMlp | Moe


class Model:
    """One rank's share of a model."""

    def __init__(
        self,
        *,
        embed_tokens: VocabShard,
        layers: list[DecoderLayer],
        norm_C: Tensor,
        lm_head: VocabShard,
        mtp: Mtp | None,
        eps: float,
        zero_centred: bool,
    ) -> None:
        self.embed_tokens = embed_tokens
        self.layers = layers
        self.norm_C = norm_C
        self.lm_head = lm_head
        self.mtp = mtp
        self._eps = eps
        self._zero_centred = zero_centred

    def forward(self, runtime: Runtime, step: StepTensors, cache: KvCache) -> Tensor:
        """Run the step's tokens through all layers, advancing the cache -> hidden [T, C], after the final norm.

        Every rank of every lane takes part; a lane without tokens (T = 0) only in what spans lanes.
        """
        if not step.tokens_T.shape[0]:
            x_TC = self.norm_C.new_zeros(0, self.norm_C.shape[0])
            for layer in self.layers:
                if isinstance(layer.mlp, Moe):
                    layer.mlp.forward(runtime, x_TC, step.lane_tokens)
            return x_TC
        kernels, eps, zero_centred = runtime.kernels, self._eps, self._zero_centred
        x_TC, y_TC = self.embed_tokens.embed(runtime, step.tokens_T), None
        for layer in self.layers:
            if y_TC is None:
                normed_TC = self._norm(runtime, x_TC, layer.input_layernorm_C)
            else:
                x_TC, normed_TC = kernels.add_rms_norm(
                    x_TC, y_TC, layer.input_layernorm_C, eps, zero_centred=zero_centred
                )
            y_TC = _mix(runtime, layer, normed_TC, step, cache)
            x_TC, normed_TC = kernels.add_rms_norm(
                x_TC, y_TC, layer.post_attention_layernorm_C, eps, zero_centred=zero_centred
            )
            if isinstance(layer.mlp, Moe):
                y_TC = layer.mlp.forward(runtime, normed_TC, step.lane_tokens)
            else:
                y_TC = layer.mlp.forward(runtime, normed_TC)
        if y_TC is None:
            return self._norm(runtime, x_TC, self.norm_C)
        return kernels.add_rms_norm(x_TC, y_TC, self.norm_C, eps, zero_centred=zero_centred)[1]

    def replay(self, runtime: Runtime, step: StepTensors, replay: Replay, cache: KvCache) -> None:
        """Advance the recurrent states of rows that verified drafts over the accepted tokens."""
        deltas = [layer.mixer for layer in self.layers if isinstance(layer.mixer, Delta)]
        for i, (delta, inputs) in enumerate(zip(deltas, step.delta_inputs, strict=True)):
            delta.replay(runtime, inputs, replay, cache.states[i])

    def _norm(self, runtime: Runtime, x: Tensor, weight_C: Tensor) -> Tensor:
        return runtime.kernels.rms_norm(x, weight_C, self._eps, zero_centred=self._zero_centred)


def _mix(runtime: Runtime, layer: DecoderLayer, x_TC: Tensor, step: StepTensors, cache: KvCache) -> Tensor:
    i = layer.mixer_index
    match layer.mixer:
        case Attention() as attention:
            with runtime.part("attention"):
                y_TC = attention.forward(runtime, x_TC, step, cache.k_pools[i], cache.v_pools[i])
            cache.progress.wrote(i + 1)
            return y_TC
        case Delta() as delta:
            with runtime.part("delta rule"):
                return delta.forward(runtime, x_TC, step, cache.states[i])
        case _:
            assert_never(layer.mixer)


def load_model(loader: Loader) -> Model:
    """Read the rank's share of every parameter.

    Raises:
        ValueError: a tensor is missing or has the wrong shape; names file, tensor, expected and found.
    """
    config = loader.config
    root = loader.reader.root
    embed_name, head_name = f"{root}.embed_tokens.weight", loader.reader.head_name(tied=config.tie_word_embeddings)
    tied = head_name == embed_name
    embed_tokens = VocabShard.load(loader, embed_name, makes_logits=tied)
    layers = []
    for i in range(config.num_hidden_layers):
        same_kind = config.delta_layers if i in config.delta_layers else config.attention_layers
        prefix = f"{root}.layers.{i}"
        layers.append(
            DecoderLayer(
                input_layernorm_C=loader.tensor(f"{prefix}.input_layernorm.weight", (config.hidden_size,)),
                mixer=_load_mixer(loader, prefix, i),
                mixer_index=same_kind.index(i),
                post_attention_layernorm_C=loader.tensor(
                    f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,)
                ),
                mlp=_load_mlp(loader, prefix, i),
            )
        )
    return Model(
        embed_tokens=embed_tokens,
        layers=layers,
        norm_C=loader.tensor(f"{root}.norm.weight", (config.hidden_size,)),
        lm_head=embed_tokens if tied else VocabShard.load(loader, head_name, makes_logits=True),
        mtp=Mtp.load(loader) if config.num_nextn_predict_layers else None,
        eps=config.rms_norm_eps,
        zero_centred=config.zero_centred_norm,
    )


def _load_mixer(loader: Loader, prefix: str, index: int) -> Attention | Delta:
    if loader.config.layer_types[index] == "linear_attention":
        return Delta.load(loader, f"{prefix}.linear_attn")
    return Attention.load(loader, f"{prefix}.self_attn")


def _load_mlp(loader: Loader, prefix: str, index: int) -> DenseMlp | Moe:
    config, cuts = loader.config, loader.cuts
    if config.is_moe_layer(index):
        return Moe.load(loader, f"{prefix}.mlp")
    return loader.mlp(f"{prefix}.mlp", config.intermediate_size, cuts.dense_columns, cuts.dense_groups)
