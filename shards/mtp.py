"""Multi-token prediction: one more decoder layer, which drafts the token after the next one.

At position p it takes the token at p + 1 and a hidden state of p: the main model's after its final norm, or, behind a
draft of its own, the one it gave itself. As Qwen3NextMultiTokenPredictor in vLLM; transformers has none. Its KV is one
more attention layer of the cache, at rotary position p.
T tokens of the step, C hidden size.
"""

from dataclasses import dataclass

from torch import Tensor

from shards.attention import Attention
from shards.linear import Runtime
from shards.loading import Loader, as_slice
from shards.moe import Moe
from shards.rows import StepTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Mtp:
    """fc over [embedding | hidden] -> full attention -> MoE -> norm. All norms are zero-centred."""

    embedding_norm_C: Tensor
    hidden_norm_C: Tensor
    fc_CF: Tensor
    """[C, 2C]; whole on every rank."""
    input_layernorm_C: Tensor
    attention: Attention
    kv_proj_NC: Tensor
    """Rows of k_proj and v_proj held here, once more: most positions need nothing else of the layer."""
    kv_bias_N: Tensor | None
    post_attention_layernorm_C: Tensor
    mlp: Moe
    norm_C: Tensor
    eps: float

    @staticmethod
    def load(loader: Loader) -> "Mtp":
        """Read the rank's share of `mtp.*`."""
        config, part = loader.config, as_slice(loader.cuts.kv_heads, loader.config.head_dim)
        hidden, kv_rows, prefix = (config.hidden_size,), config.num_key_value_heads * config.head_dim, "mtp.layers.0"
        kv = [(f"{prefix}.self_attn.{name}_proj.weight", kv_rows, part) for name in ("k", "v")]
        biases = [(f"{prefix}.self_attn.{name}_proj.bias", kv_rows, part) for name in ("k", "v")]
        return Mtp(
            embedding_norm_C=loader.tensor("mtp.pre_fc_norm_embedding.weight", hidden),
            hidden_norm_C=loader.tensor("mtp.pre_fc_norm_hidden.weight", hidden),
            fc_CF=loader.kernels.lay_out(loader.tensor("mtp.fc.weight", (config.hidden_size, 2 * config.hidden_size))),
            input_layernorm_C=loader.tensor(f"{prefix}.input_layernorm.weight", hidden),
            attention=Attention.load(loader, f"{prefix}.self_attn"),
            kv_proj_NC=loader.linear(kv),
            kv_bias_N=loader.stacked(biases, ()) if config.qkv_bias else None,
            post_attention_layernorm_C=loader.tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
            mlp=Moe.load(loader, f"{prefix}.mlp"),
            norm_C=loader.tensor("mtp.norm.weight", hidden),
            eps=config.rms_norm_eps,
        )

    def store_kv(
        self,
        runtime: Runtime,
        embedded_TC: Tensor,
        hidden_TC: Tensor,
        step: StepTensors,
        k_pool_NGPD: Tensor,
        v_pool_NGPD: Tensor,
    ) -> None:
        """Write the layer's k and v of the step's positions, without running the layer.

        Args:
            embedded_TC: embeddings of the tokens behind the positions.
            hidden_TC: hidden states of the positions.
        """
        x_TC = self._norm(runtime, self._enter(runtime, embedded_TC, hidden_TC), self.input_layernorm_C)
        runtime.kernels.attention_inputs(
            runtime.kernels.linear(x_TC, self.kv_proj_NC, self.kv_bias_N),
            None,
            self.attention.k_norm_D,
            self.eps,
            step.cos_TR,
            step.sin_TR,
            k_pool_NGPD,
            v_pool_NGPD,
            step.slots_T,
            gated=False,
            zero_centred=True,
        )

    def forward(
        self,
        runtime: Runtime,
        embedded_TC: Tensor,
        hidden_TC: Tensor,
        step: StepTensors,
        k_pool_NGPD: Tensor,
        v_pool_NGPD: Tensor,
    ) -> Tensor:
        """Run the layer at the step's positions, storing their k and v -> hidden states [T, C] for the shared head.

        Arguments as in `store_kv`. Every rank of every lane takes part, a lane with T = 0 in what spans lanes.
        """
        if not hidden_TC.shape[0]:
            return self.mlp.forward(runtime, hidden_TC, step.lane_tokens)
        kernels, eps = runtime.kernels, self.eps
        x_TC = self._enter(runtime, embedded_TC, hidden_TC)
        normed_TC = self._norm(runtime, x_TC, self.input_layernorm_C)
        y_TC = self.attention.forward(runtime, normed_TC, step, k_pool_NGPD, v_pool_NGPD)
        x_TC, normed_TC = kernels.add_rms_norm(x_TC, y_TC, self.post_attention_layernorm_C, eps, zero_centred=True)
        y_TC = self.mlp.forward(runtime, normed_TC, step.lane_tokens)
        return kernels.add_rms_norm(x_TC, y_TC, self.norm_C, eps, zero_centred=True)[1]

    def _enter(self, runtime: Runtime, embedded_TC: Tensor, hidden_TC: Tensor) -> Tensor:
        embedded_TC = self._norm(runtime, embedded_TC, self.embedding_norm_C)
        hidden_TC = self._norm(runtime, hidden_TC, self.hidden_norm_C)
        return runtime.kernels.linear(runtime.kernels.beside(embedded_TC, hidden_TC), self.fc_CF)

    def _norm(self, runtime: Runtime, x: Tensor, weight: Tensor) -> Tensor:
        return runtime.kernels.rms_norm(x, weight, self.eps, zero_centred=True)
