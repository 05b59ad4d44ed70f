"""Multi-head attention and transformer blocks (Vaswani et al. 2017), batch first."""

from __future__ import annotations

from typing import Any

from ...ir.errors import AttributeValueError, ShapeError
from .. import functions as F
from ..tensor import Tensor
from . import functional, init
from .layers import Dropout, LayerNorm, Linear, parameter
from .module import Module, ModuleList


class MultiHeadAttention(Module):
    """Attention in `num_heads` subspaces: (batch, n, embed_dim), (batch, m, embed_dim) -> (batch, n, embed_dim).

    The weights are torch's: `in_proj_weight` (3 * embed_dim, embed_dim) holds query, key and value
    projections, `out_proj` the output's. `dropout` applies to the attention probabilities.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        if embed_dim % num_heads:
            raise ShapeError(f"MultiHeadAttention: embed_dim {embed_dim} does not divide into {num_heads} heads")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.in_proj_weight = parameter((3 * embed_dim, embed_dim), init.xavier_uniform())
        self.register_parameter("in_proj_bias", parameter((3 * embed_dim,), init.constant(0)) if bias else None)
        self.out_proj = Linear(embed_dim, embed_dim, bias)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None,
                mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention of `query` to `key`/`value` (by default to itself).

        Args:
            query: (batch, n, embed_dim).
            key, value: (batch, m, embed_dim).
            mask: bool (True: may look) or additive float, broadcastable to (batch, heads, n, m).
            causal: position i looks at positions <= i only.
        """
        q, k, v = self._project(query, key, value)
        batch, n = query.shape[0], query.shape[1]
        if self.training and self.dropout:
            y = self._attend_with_dropout(q, k, v, mask, causal)
        else:
            y = F.attention(q, k, v, mask, causal=causal)  # (batch, heads, n, head_dim)
        return self.out_proj(F.transpose(y, (0, 2, 1, 3)).reshape((batch, n, self.embed_dim)))

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> list[Tensor]:
        e = self.embed_dim
        if key is None:
            joint = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            parts = F.split(joint, 3, axis=-1)
        else:
            sources = (query, key, key if value is None else value)
            parts = [functional.linear(x, self.in_proj_weight[i * e:(i + 1) * e],
                                       None if self.in_proj_bias is None else self.in_proj_bias[i * e:(i + 1) * e])
                     for i, x in enumerate(sources)]
        return [self._heads(p) for p in parts]

    def _heads(self, x: Tensor) -> Tensor:
        split = x.reshape((x.shape[0], x.shape[1], self.num_heads, self.embed_dim // self.num_heads))
        return F.transpose(split, (0, 2, 1, 3))  # (batch, heads, positions, head_dim)

    def _attend_with_dropout(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        scores = F.matmul(q * (q.shape[-1] ** -0.5), k, transpose_y=True)  # (batch, heads, n, m)
        if causal:
            visible = F.tril(F.ones((q.shape[2], k.shape[2]), dtype="bool"))
            scores = F.where(visible, scores, F.full((), float("-inf"), dtype=scores.dtype))
        if mask is not None:
            lowest = F.full((), float("-inf"), dtype=scores.dtype)
            scores = F.where(mask, scores, lowest) if mask.dtype.is_bool else scores + mask
        return F.matmul(functional.dropout(F.softmax(scores, axis=-1), self.dropout, True), v)


def _activation(name: Any) -> Any:
    known = {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu}
    if callable(name):
        return name
    if name not in known:
        raise AttributeValueError(f"activation is a function or one of {', '.join(known)}, not {name!r}")
    return known[name]


class TransformerEncoderLayer(Module):
    """Self-attention and a two-layer perceptron, each with a residual and a layer norm (before it: `norm_first`)."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: Any = "relu", norm_first: bool = False, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout)
        self.linear1 = Linear(d_model, dim_feedforward)
        self.linear2 = Linear(dim_feedforward, d_model)
        self.norm1, self.norm2 = LayerNorm(d_model, layer_norm_eps), LayerNorm(d_model, layer_norm_eps)
        self.dropout, self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout), Dropout(dropout)
        self.activation, self.norm_first = _activation(activation), norm_first

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """(batch, n, d_model) -> the same; `mask` and `causal` as in MultiHeadAttention."""
        if self.norm_first:
            x = x + self.dropout1(self.self_attn(self.norm1(x), mask=mask, causal=causal))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self.dropout1(self.self_attn(x, mask=mask, causal=causal)))
        return self.norm2(x + self._feed_forward(x))


class TransformerDecoderLayer(Module):
    """Self-attention, attention to an encoder's output, and a perceptron, with residuals and norms."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: Any = "relu", norm_first: bool = False, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout)
        self.multihead_attn = MultiHeadAttention(d_model, nhead, dropout)
        self.linear1 = Linear(d_model, dim_feedforward)
        self.linear2 = Linear(dim_feedforward, d_model)
        self.norm1, self.norm2 = LayerNorm(d_model, layer_norm_eps), LayerNorm(d_model, layer_norm_eps)
        self.norm3 = LayerNorm(d_model, layer_norm_eps)
        self.dropout = Dropout(dropout)
        self.dropout1, self.dropout2, self.dropout3 = Dropout(dropout), Dropout(dropout), Dropout(dropout)
        self.activation, self.norm_first = _activation(activation), norm_first

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, memory_mask: Tensor | None = None,
                causal: bool = False) -> Tensor:
        """x (batch, n, d_model) attends to itself and to `memory` (batch, m, d_model)."""
        if self.norm_first:
            x = x + self.dropout1(self.self_attn(self.norm1(x), mask=mask, causal=causal))
            x = x + self.dropout2(self.multihead_attn(self.norm2(x), memory, memory, mask=memory_mask))
            return x + self._feed_forward(self.norm3(x))
        x = self.norm1(x + self.dropout1(self.self_attn(x, mask=mask, causal=causal)))
        x = self.norm2(x + self.dropout2(self.multihead_attn(x, memory, memory, mask=memory_mask)))
        return self.norm3(x + self._feed_forward(x))


class TransformerEncoder(Module):
    """`num_layers` encoder layers, made by calling `layer()`, and an optional final norm."""

    def __init__(self, layer: Any, num_layers: int, norm: Module | None = None):
        super().__init__()
        self.layers = ModuleList(layer() for _ in range(num_layers))
        self.add_module("norm", norm)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask=mask, causal=causal)
        return x if self.norm is None else self.norm(x)
