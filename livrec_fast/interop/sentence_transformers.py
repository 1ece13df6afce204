"""Losses for sentence-transformers' trainer: its in-batch negatives, computed in linear memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.contrastive import in_batch_contrastive
from ._all_ranks import over_all_ranks

try:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim, dot_score
except ImportError as error:
    raise ImportError(
        "sentence-transformers 5 or later is needed, with what its trainer asks for: "
        "pip install 'sentence-transformers[train]'"
    ) from error

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]

_ONE_WAY = {("query_to_doc",)}
_BOTH_WAYS = {("query_to_doc", "doc_to_query"), ("doc_to_query", "query_to_doc")}


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """sentence-transformers' loss of the same name by `in_batch_contrastive`.

    The loss of row i is logsumexp_j s_ij - s_ii, s_ij = scale * similarity(anchor_i, document_j),
    where the documents are the batch's positives and all its hard negatives. It never makes the
    B x B (1 + negatives) scores: beyond the embeddings and their gradients it needs the workspace
    that `in_batch_contrastive` states, so that a batch is bounded by the encoder's activations.

    Args:
        model: the SentenceTransformer.
        scale: what similarities are multiplied by, 1 / temperature; a float, or a 0-d tensor or
            parameter that may want a gradient.
        similarity_fct: `util.cos_sim` or `util.dot_score`.
        gather_across_devices: take the batch of all ranks, with exact gradients, as
            `InBatchContrastive` does with ranks="gathered"; the loss is then the joined batch's.
        directions: ("query_to_doc",), or with "doc_to_query" and partition_mode "per_direction".
        partition_mode: "joint" or "per_direction", which differ with two directions only.
        hardness_mode: None, or any mode with a strength of 0.
        hardness_strength: of hardness_mode.
        false_negative_threshold: where the cosine of two anchors is greater, neither one's positive
            is a negative of the other; None masks nothing. Hard negatives are never masked.
        backend: "auto", "native", "triton" or "reference", as of `in_batch_contrastive`.

    Raises:
        ImportError: on import, sentence-transformers is not installed. ValueError: what the class
        of sentence-transformers refuses, and another similarity, direction or mode than the above.

    Source: Henderson et al., Efficient Natural Language Response Suggestion for Smart Reply (2017).

    Example:
        >>> from livrec_fast.interop.sentence_transformers import MultipleNegativesRankingLoss
        >>> loss = MultipleNegativesRankingLoss(model, false_negative_threshold=0.95)
        >>> SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()
    """

    def __init__(
        self,
        model: Any,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        false_negative_threshold: float | None = None,
        backend: str = "auto",
    ):
        super().__init__(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
        )
        self.false_negative_threshold = false_negative_threshold
        self.backend = backend
        self._check()

    def _check(self) -> None:
        """Refuse what the op does not compute; settings may be assigned, so each step asks."""
        if self.similarity_fct not in (cos_sim, dot_score):
            raise ValueError(
                f"similarity_fct: must be util.cos_sim or util.dot_score, got {self.similarity_fct}"
            )
        if self.hardness_mode is not None and self.hardness_strength > 0:
            raise ValueError(f"hardness_mode: must be None, got {self.hardness_mode!r}")
        both = self.directions in _BOTH_WAYS and self.partition_mode == "per_direction"
        if self.directions not in _ONE_WAY and not both:
            raise ValueError(
                "directions: must be ('query_to_doc',), or ('query_to_doc', 'doc_to_query') with "
                f"partition_mode='per_direction', got {self.directions} with "
                f"partition_mode={self.partition_mode!r}"
            )

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of [B, D] embeddings: anchors, positives, then hard negatives.

        Args:
            embeddings: a tensor per column of the data set.
            labels: not used; the positive of an anchor is in its row.

        Returns:
            0-d, the mean over the batch.
        """
        self._check()
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: at least 2 columns are needed, got {len(embeddings)}")
        anchors, positives, *negatives = embeddings
        loss_of = over_all_ranks if self.gather_across_devices else in_batch_contrastive
        return loss_of(
            anchors,
            positives,
            temperature=1 / self.scale,
            normalize=self.similarity_fct is cos_sim,
            symmetric=self.directions in _BOTH_WAYS,
            false_negative_threshold=self.false_negative_threshold,
            extra_keys=torch.cat(negatives) if negatives else None,
            backend=self.backend,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, as model cards show them."""
        return super().get_config_dict() | _ours(self)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """sentence-transformers' cached loss (GradCache) with `in_batch_contrastive` as its loss stage.

    The batch is embedded in mini-batches twice, without and with gradients, so that activations of
    one mini-batch are held at a time; the loss between the two takes the whole batch at once.

    Args:
        model: the SentenceTransformer; none with a StaticEmbedding.
        scale: this and all that MultipleNegativesRankingLoss has: as there.
        similarity_fct: as there.
        mini_batch_size: how many texts are embedded at once; the loss is not cut up by it.
        mini_batch_num_tokens: or how many tokens, where not None.
        gather_across_devices: as there.
        directions: as there.
        partition_mode: as there.
        show_progress_bar: show one for the mini-batches.
        hardness_mode: as there.
        hardness_strength: as there.
        false_negative_threshold: as there.
        backend: as there.

    Raises:
        ImportError, ValueError: as there; and a model that cannot be embedded in mini-batches.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
    (2021).

    Example:
        >>> loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)
        >>> SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()
    """

    def __init__(
        self,
        model: Any,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        false_negative_threshold: float | None = None,
        backend: str = "auto",
    ):
        super().__init__(
            model,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )
        self.loss = MultipleNegativesRankingLoss(  # which has the settings of this one, too
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
            false_negative_threshold=false_negative_threshold,
            backend=backend,
        )

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """Compute the loss of embeddings by column and mini-batch.

        Args:
            reps: the embeddings.
            labels: not used.
            with_backward: compute the gradients of `reps`, too, and detach the loss.

        Returns:
            0-d, the mean over the batch.
        """
        columns = [torch.cat(parts) for parts in reps]
        loss: Tensor = self.loss.compute_loss_from_embeddings(columns, labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, as model cards show them."""
        return super().get_config_dict() | _ours(self.loss)


def _ours(loss: nn.Module) -> dict[str, Any]:
    return {"false_negative_threshold": loss.false_negative_threshold, "backend": loss.backend}
