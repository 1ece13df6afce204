r"""The token backbone: layers that mix tokens, then boost each by weights of its own.

What belongs to one token is kept by the slot's name, so that a model with one slot more or less
takes over all that it has in common with another.

Source: Zenith, as FLUID uses it. The layer's form is second-hand: RSA is
$O = X X^\top X W_R$ without softmax, then $\mathrm{Norm}(O + \mathrm{MLP}(X))$; here k = D, and the
Gram matrix is divided by D. Mixing (by `residual`) and boost add to their input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig


class PerToken(nn.Module):
    """A matrix [inputs, outputs] for each slot."""

    def __init__(self, slots: Sequence[str], inputs: int, outputs: int, fan: int | None = None):
        super().__init__()
        self.slots = list(slots)
        bound = (3 / (fan or inputs)) ** 0.5
        self.weights = nn.ParameterDict(
            {slot: torch.empty(inputs, outputs).uniform_(-bound, bound) for slot in self.slots}
        )

    def stacked(self) -> Tensor:
        """Return all matrices, [T, inputs, outputs], in the order of the slots."""
        return torch.stack([self.weights[slot] for slot in self.slots])

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each token of x [R, T, inputs] by its matrix."""
        return torch.bmm(x.transpose(0, 1), self.stacked()).transpose(0, 1)


class SharedMLP(nn.Sequential):
    """The MLP that all tokens of a layer go through."""

    def __init__(self, config: ModelConfig):
        width = config.width
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class RSA(nn.Module):
    """Mix tokens by their own Gram matrix."""

    def __init__(self, slots: Sequence[str], config: ModelConfig):
        super().__init__()
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.mlp, self.norm = SharedMLP(config), nn.LayerNorm(config.width)
        self.residual = config.residual

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [R, T, D]."""
        gram = torch.bmm(x, x.transpose(1, 2)) / x.shape[2]
        mixed = torch.bmm(gram, self.out(x)) + self.mlp(x)
        return self.norm(x + mixed if self.residual else mixed)


class TMHSA(nn.Module):
    """Mix tokens by attention whose queries, keys and values have a matrix for each token."""

    def __init__(self, slots: Sequence[str], config: ModelConfig):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width: {config.width} is no multiple of heads, {config.heads}")
        self.heads = config.heads
        self.qkv = PerToken(slots, config.width, 3 * config.width)
        self.out = PerToken(slots, config.width, config.width)
        self.mlp, self.norm = SharedMLP(config), nn.LayerNorm(config.width)
        self.residual = config.residual

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [R, T, D]."""
        split = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind()).transpose(1, 2).flatten(2)
        mixed = self.out(mixed) + self.mlp(x)
        return self.norm(x + mixed if self.residual else mixed)


class TokenSwiGLU(nn.Module):
    """x + W_down(silu(W_gate x) * W_up x), with matrices of each token's own."""

    def __init__(self, slots: Sequence[str], config: ModelConfig):
        super().__init__()
        self.up = PerToken(slots, config.width, 2 * config.hidden)
        self.down = PerToken(slots, config.hidden, config.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Boost x [R, T, D]; there is no loss."""
        gate, up = self.up(x).chunk(2, 2)
        return x + self.down(F.silu(gate) * up), None


class TokenMoE(nn.Module):
    r"""Each token goes through the `active` experts that its router likes best, of its own E.

    The losses are the balance of Switch, $E \sum_e f_e p_e$ with f the share of rows that expert e
    takes and p its mean probability, and the router's z loss, $\mathrm{mean}(\mathrm{lse}^2)$.
    """

    def __init__(self, slots: Sequence[str], config: ModelConfig):
        super().__init__()
        self.active, self.experts = config.active, config.experts
        self.weigh = {"balance": config.balance, "z": config.z}
        self.router = PerToken(slots, config.width, config.experts)
        names = [f"{slot}_{expert}" for slot in slots for expert in range(config.experts)]
        self.up = PerToken(names, config.width, 2 * config.hidden)
        self.down = PerToken(names, config.hidden, config.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Boost x [R, T, D], and return the losses' weighted sum."""
        logits = self.router(x)
        odds, chosen = logits.softmax(2).topk(self.active, 2)
        share = odds / odds.sum(2, keepdim=True) if self.active > 1 else odds
        boosted = [
            token + self._experts(slot, token, *picks)
            for slot, token, *picks in zip(
                self.router.slots, x.unbind(1), chosen.unbind(1), share.unbind(1), strict=True
            )
        ]
        return torch.stack(boosted, 1), self._loss(logits, chosen)

    def _experts(self, slot: str, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """Return what the chosen experts of a slot make of x [R, D]; chosen, share: [R, active]."""
        out = torch.zeros_like(x)
        for expert in range(self.experts):
            row, pick = (chosen == expert).nonzero(as_tuple=True)
            name = f"{slot}_{expert}"
            gate, up = (x[row] @ self.up.weights[name]).chunk(2, 1)
            made = (F.silu(gate) * up) @ self.down.weights[name]
            out = out.index_add(0, row, made * share[row, pick, None])
        return out

    def _loss(self, logits: Tensor, chosen: Tensor) -> Tensor:
        taken = F.one_hot(chosen, self.experts).sum(2).float().mean(0) / self.active  # [T, E]
        balance = self.experts * (taken * logits.softmax(2).mean(0)).sum(1).mean()
        return (
            self.weigh["balance"] * balance + self.weigh["z"] * logits.logsumexp(2).square().mean()
        )


class Backbone(nn.Module):
    """Layers of mixing and boosting."""

    def __init__(self, slots: Sequence[str], config: ModelConfig):
        super().__init__()
        mixing = RSA if config.mixing == "rsa" else TMHSA
        boost = TokenSwiGLU if config.boost == "swiglu" else TokenMoE
        self.mix = nn.ModuleList(mixing(slots, config) for _ in range(config.layers))
        self.boost = nn.ModuleList(boost(slots, config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens [R, T, D] after all layers, and the sum of the routers' losses."""
        total = x.new_zeros(())
        for mix, boost in zip(self.mix, self.boost, strict=True):
            x, loss = boost(mix(x))
            total = total if loss is None else total + loss
        return x, total
