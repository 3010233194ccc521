"""The whole model for training: main layers and multi-token prediction (MTP) head, named as in checkpoints."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from shards.config import ModelConfig
from training.layers import Attention, DeltaNet, Moe, RmsNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What one pass over whole sequences gives."""

    logits_BTV: Tensor
    """Position t predicts token t + 1."""
    mtp_logits_BTV: Tensor | None
    """Position t predicts token t + 2 from the hidden state of t and the token t + 1; length T - 1."""
    balance: Tensor
    """Mean over layers of the experts' balance loss; 1 is even."""


class Layer(nn.Module):
    """Attention or delta rule, then experts, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig, *, attention: bool) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)
        # The unused one must not exist: checkpoints name what they hold.
        if attention:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = DeltaNet(config)
        self._attention = attention
        self.mlp = Moe(config)

    @override
    def forward(self, x_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and its experts' balance loss."""
        mixer = self.self_attn if self._attention else self.linear_attn
        x_BTH = x_BTH + mixer(self.input_layernorm(x_BTH))
        out, balance = self.mlp(self.post_attention_layernorm(x_BTH))
        return x_BTH + out, balance


class Body(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # It is the output head too: rows of length one give logits of about one.
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        kinds = config.layer_types
        self.layers = nn.ModuleList(Layer(config, attention=kind == "full_attention") for kind in kinds)
        self.norm = _norm(config)

    @override
    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normed hidden states [B, T, H] and each layer's balance loss."""
        x_BTH, balances = self.embed_tokens(tokens_BT), list[Tensor]()
        for layer in self.layers:
            x_BTH, balance = layer(x_BTH)
            balances.append(balance)
        return self.norm(x_BTH), balances


class MtpHead(nn.Module):
    """One attention and MoE layer over [embedding of the next token | hidden state behind the final norm]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = _norm(config), _norm(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Layer(config, attention=True)])
        self.norm = _norm(config)

    @override
    def forward(self, embedding_BTH: Tensor, hidden_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """Normed hidden states for the shared output head, and the balance loss."""
        joined = torch.cat([self.pre_fc_norm_embedding(embedding_BTH), self.pre_fc_norm_hidden(hidden_BTH)], dim=-1)
        out, balance = self.layers[0](self.fc(joined).float())
        return self.norm(out), balance


class Model(nn.Module):
    """A causal language model with its embedding as its head; the `state_dict` has published names but for experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Body(config)
        assert config.tie_word_embeddings
        self._has_mtp = config.num_nextn_predict_layers > 0
        if self._has_mtp:
            self.mtp = MtpHead(config)

    @override
    def forward(self, tokens_BT: Tensor) -> Outputs:
        """Run whole sequences, padded at the right."""
        hidden_BTH, balances = self.model(tokens_BT)
        mtp_logits = None
        if self._has_mtp:
            following = self.model.embed_tokens(tokens_BT[:, 1:])
            # The hidden state of the last position has no next token; a zero row keeps the length a whole one.
            following = torch.cat([following, torch.zeros_like(following[:, :1])], dim=1)
            ahead, balance = self.mtp(following, hidden_BTH)
            mtp_logits = self._head(ahead[:, :-1])
            balances.append(balance)
        return Outputs(
            logits_BTV=self._head(hidden_BTH), mtp_logits_BTV=mtp_logits, balance=torch.stack(balances).mean()
        )

    def _head(self, hidden_BTH: Tensor) -> Tensor:
        return functional.linear(hidden_BTH, self.model.embed_tokens.weight)


def _norm(config: ModelConfig) -> RmsNorm:
    return RmsNorm(config.hidden_size, config.rms_norm_eps, zero_centred=config.zero_centred_norm)
