"""Full attention over paged KV, its heads spread over the lane's ranks.

T tokens of the step, C hidden size, H query heads and G KV heads held here, D head dim, P block size, N blocks.
"""

from dataclasses import dataclass

from torch import Tensor

from shards.linear import RowLinear, Runtime
from shards.loading import Loader, as_slice
from shards.rows import StepTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Rotary attention, q and k normed in most families; Qwen3-Next's queries carry a sigmoid gate for the output."""

    qkv_proj_NC: Tensor
    """Rows held here of q_proj (per head [query | gate] where gated), then k_proj, then v_proj."""
    qkv_bias_N: Tensor | None
    q_norm_D: Tensor | None
    """None: neither queries nor keys are normed."""
    k_norm_D: Tensor | None
    o_proj: RowLinear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated: bool
    zero_centred: bool
    eps: float

    @staticmethod
    def load(loader: Loader, prefix: str) -> "Attention":
        """The attention layer whose tensors start with `prefix`."""
        config, cuts = loader.config, loader.cuts
        head_dim, query_rows = config.head_dim, config.head_dim * (2 if config.attention_gated else 1)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        cut = [
            ("q_proj", heads * query_rows, as_slice(cuts.heads, query_rows)),
            ("k_proj", kv_heads * head_dim, as_slice(cuts.kv_heads, head_dim)),
            ("v_proj", kv_heads * head_dim, as_slice(cuts.kv_heads, head_dim)),
        ]
        weights = [(f"{prefix}.{name}.weight", rows, part) for name, rows, part in cut]
        biases = [(f"{prefix}.{name}.bias", rows, part) for name, rows, part in cut]
        return Attention(
            qkv_proj_NC=loader.linear(weights),
            qkv_bias_N=loader.stacked(biases, ()) if config.qkv_bias else None,
            q_norm_D=loader.tensor(f"{prefix}.q_norm.weight", (head_dim,)) if config.qk_norm else None,
            k_norm_D=loader.tensor(f"{prefix}.k_norm.weight", (head_dim,)) if config.qk_norm else None,
            o_proj=loader.row_linear(
                f"{prefix}.o_proj.weight",
                heads * head_dim,
                as_slice(cuts.heads, head_dim),
                cuts.head_groups,
                bias=f"{prefix}.o_proj.bias" if config.o_proj_bias else None,
            ),
            num_heads=len(cuts.heads),
            num_kv_heads=len(cuts.kv_heads),
            head_dim=head_dim,
            gated=config.attention_gated,
            zero_centred=config.zero_centred_norm,
            eps=config.rms_norm_eps,
        )

    def forward(
        self, runtime: Runtime, x_TC: Tensor, step: StepTensors, k_pool_NGPD: Tensor, v_pool_NGPD: Tensor
    ) -> Tensor:
        """Stores the step's k and v, attends, projects -> [T, C] on every rank of the lane."""
        kernels, D = runtime.kernels, self.head_dim
        qkv_TN = kernels.linear(x_TC, self.qkv_proj_NC, self.qkv_bias_N)
        q_THD = kernels.attention_inputs(
            qkv_TN,
            self.q_norm_D,
            self.k_norm_D,
            self.eps,
            step.cos_TR,
            step.sin_TR,
            k_pool_NGPD,
            v_pool_NGPD,
            step.slots_T,
            gated=self.gated,
            zero_centred=self.zero_centred,
        )
        gate_THD = None
        if self.gated:
            gate_THD = qkv_TN[:, : 2 * self.num_heads * D].unflatten(1, (self.num_heads, 2 * D))[..., D:]
        tables, starts, contexts = step.tables_SB, step.query_start_S1, step.context_lens_S
        out_THD = kernels.attention(q_THD, k_pool_NGPD, v_pool_NGPD, tables, starts, contexts, D**-0.5, gate_THD)
        return self.o_proj.forward(runtime, runtime.comms.tp, out_THD.flatten(1))
