"""Target attention with projections: parameters, and where the projections go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import check_choice, check_one_dtype, check_same
from ..ops._attention import ACTIVATIONS, resolve_scale
from ..ops.target_attention import target_attention
from ..ops.target_attention_features import target_attention_features
from ._code_items import check_count

_PROJECTIONS = ("query", "key", "value", "out")


class ProjectedAttention(nn.Module):
    """The projections of queries, keys, values and results, and attention through them."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        out_dim: int | None = None,
        biases: Sequence[str] = (),
        activation: str = "softmax",
        scale: float | None = None,
        absorb: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ):
        """Make the projections.

        Args:
            dim: of a candidate.
            heads: H.
            key_dim: of an item of a history; dim where None.
            head_dim: d, of a head's query; dim / heads, rounded up, where None.
            value_dim: of a head's value; head_dim where None.
            out_dim: of a last projection; None, no such projection, the heads side by side.
            biases: which of "query", "key", "value" and "out" have one.
            activation: of the logits: "softmax", "none", "silu" or "sigmoid".
            scale: s; head_dim ** -0.5 where None.
            absorb: "none", "query", or "auto": "query" where the candidates per user are few, up to
                key_dim (d + value_dim) / (2 key_dim - d - value_dim), unless key or value has a
                bias.
            dtype: of the parameters; torch's default where None.
            device: of the parameters.
            backend: of the op.
        """
        super().__init__()
        sizes = {"key_dim": key_dim, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in ({"dim": dim, "heads": heads} | sizes | {"out_dim": out_dim}).items():
            check_count(name, 1 if size is None and name not in ("dim", "heads") else size)
        for name in biases:
            check_choice("biases", name, _PROJECTIONS if out_dim else _PROJECTIONS[:3])
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("absorb", absorb, ("auto", "none", "query"))
        self._linear = not {"key", "value"} & set(biases)
        if absorb == "query" and not self._linear:
            raise ValueError("biases: key and value must have none with absorb='query'")
        self.heads, self.dim, self.key_dim = heads, dim, key_dim or dim
        self.head_dim = head_dim or -(-dim // heads)
        self.value_dim = value_dim or self.head_dim
        self.activation, self.absorb, self.backend = activation, absorb, backend
        self.scale = resolve_scale(scale, torch.empty(0, self.head_dim, device="meta"))
        joined = heads * self.value_dim
        self.out_dim = out_dim or joined
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        self.query = nn.Linear(dim, heads * self.head_dim, bias="query" in biases, **made)
        self.key = nn.Linear(self.key_dim, heads * self.head_dim, bias="key" in biases, **made)
        self.value = nn.Linear(self.key_dim, joined, bias="value" in biases, **made)
        self.out = (
            nn.Linear(joined, out_dim, bias="out" in biases, **made) if out_dim else nn.Identity()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in (self.query, self.key, self.value, self.out):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _check(self, **rows: Tensor) -> None:
        check_one_dtype(parameters=self.query.weight, **rows)
        check_same("device", parameters=self.query.weight, **rows)

    def _absorbs(self, q: Tensor, offsets: Tensor) -> bool:
        """Choose the way that costs less, where the history is long: by additions per item."""
        if self.absorb != "auto" or not self._linear:
            return self.absorb == "query"
        users = max(offsets.shape[0] - 1, 1)
        per_user = q.shape[1] if q.dim() == 4 else q.shape[0] / users
        made = self.head_dim + self.value_dim
        return per_user * (2 * self.key_dim - made) <= self.key_dim * made

    def _attend(
        self, q: Tensor, x: Tensor, offsets: Tensor, bias: Tensor | None,
        q_offsets: Tensor | None = None, heads: slice = slice(None),
    ) -> Tensor:  # fmt: skip
        """Attend with queries of some heads, [B, C, h, d] or [Q, h, d], to rows x [T, key_dim]."""
        settings: dict[str, Any] = {
            "bias": bias, "scale": self.scale, "activation": self.activation,
            "q_offsets": q_offsets, "backend": self.backend,
        }  # fmt: skip
        both = self.key, self.value
        if self._absorbs(q, offsets):
            w_k, w_v = (self._weight(module)[heads].permute(2, 0, 1) for module in both)
            out = target_attention_features(q, x, w_k, w_v, offsets, **settings)
        else:
            k, v = (self._project(module, x, heads) for module in both)
            out = target_attention(q, k, v, offsets, **settings)
        assert isinstance(out, Tensor)
        return out

    def _weight(self, module: nn.Linear) -> Tensor:
        """Return the weight as [H, d or dv, dim]."""
        return module.weight.unflatten(0, (self.heads, -1))

    def _project(self, module: nn.Linear, x: Tensor, heads: slice) -> Tensor:
        """Return keys or values of some heads, [T, h, d or dv]."""
        weight, bias = self._weight(module)[heads], module.bias
        if bias is not None:
            bias = bias.unflatten(0, (self.heads, -1))[heads].flatten()
        projected = functional.linear(x, weight.flatten(0, 1), bias)
        return projected.unflatten(-1, weight.shape[:2])

    def extra_repr(self) -> str:
        """Describe the module in `print(module)`."""
        return (
            f"dim={self.dim}, heads={self.heads}, key_dim={self.key_dim}, "
            f"activation={self.activation!r}, absorb={self.absorb!r}, out_dim={self.out_dim}"
        )
