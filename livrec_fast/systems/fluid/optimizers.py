"""The optimisers: AdamW for layers, Adagrad on rows for tables; their state by parameters' names.

Tables of codes and ids are updated by the backward pass of their lookups; the history's tables
have sparse gradients, and are updated here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...modules._row_optimizers import backend_of_rows
from ...ops.row_update import row_update
from .config import TrainConfig
from .ranker import Ranker
from .tokens import row_rule

_FIELDS = ("step", "exp_avg", "exp_avg_sq")


class Optimizers:
    """All that is stepped after the backward pass."""

    def __init__(self, model: Ranker, train: TrainConfig):
        self.model, self.rule = model, row_rule(train, history=True)
        self.rest, self.clip = model.rest(), train.clip
        self.adam = torch.optim.AdamW(
            list(self.rest.values()), lr=train.rate, weight_decay=train.decay, fused=True
        )
        self.backend = backend_of_rows(model.config.backend)
        self.tables = model.sparse_tables()
        self.sums = {name: self.rule.new_state(table) for name, table in self.tables.items()}

    def zero(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)
        for table in self.tables.values():
            table.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Take a step; the layers' gradients, as one vector, are cut to length `clip`."""
        torch.nn.utils.clip_grad_norm_(self.rest.values(), self.clip)
        self.adam.step()
        for name, table in self.tables.items():
            if table.grad is None:
                continue
            grad = table.grad.coalesce()
            row_update(
                table.detach(), grad.indices()[0], grad.values(), state=self.sums[name],
                **self.rule.step(), backend=self.backend,
            )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Return the state by name: of AdamW, and the sums of squares of the history's tables."""
        kept = {f"rows.{name}": sums for name, sums in self.sums.items() if sums is not None}
        for name, parameter in self.rest.items():
            for part, tensor in self.adam.state.get(parameter, {}).items():
                kept[f"adam.{part}.{name}"] = tensor
        return kept

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what the state of another model's optimisers has in common with this one's."""
        for name, sums in self.sums.items():
            if sums is not None and f"rows.{name}" in state:
                sums.copy_(state[f"rows.{name}"])
        for name, parameter in self.rest.items():
            found = {part: state.get(f"adam.{part}.{name}") for part in _FIELDS}
            if all(tensor is not None for tensor in found.values()):
                self.adam.state[parameter] = {
                    part: tensor.clone() for part, tensor in found.items() if tensor is not None
                }
