"""A loss for OpenCLIP's training loop: its ClipLoss, computed in linear memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..ops.contrastive import in_batch_contrastive
from ._all_ranks import check_world_size, over_all_ranks


class ClipLoss(nn.Module):
    """`open_clip.ClipLoss` by `in_batch_contrastive`.

    The mean of two cross entropies, of each image among the batch's texts and of each text among
    its images; logits are logit_scale * <image_i, text_j>. Without the B x B logits: beyond
    features and their gradients it needs the workspace that `in_batch_contrastive` states.

    With several ranks the batch is that of all ranks, and the loss is as `InBatchContrastive` has
    it with ranks="gathered": each rank computes its own rows, all have the joined batch's loss,
    and the mean of their gradients, which DistributedDataParallel takes, is the joined batch's.
    These are the gradients of OpenCLIP with `gather_with_grad`; without, it drops some.

    Args:
        local_loss: taken and ignored, as it changes no gradient once they are exact.
        gather_with_grad: taken and ignored: gradients always reach the rank they belong to.
        cache_labels: taken and ignored: there are no labels.
        rank: taken and ignored; torch.distributed knows.
        world_size: how many ranks there are; with more than one, torch.distributed's default group.
        use_horovod: False.
        false_negative_threshold: where the cosine of two images' features is greater, neither
            one's text is a negative of the other, in both directions; None masks nothing.
        backend: "auto", "native", "triton" or "reference", as of `in_batch_contrastive`.

    Raises:
        ValueError: use_horovod, or another world_size than torch.distributed has.

    open_clip is not needed. Source: Radford et al., Learning Transferable Visual Models From
    Natural Language Supervision (2021); https://github.com/mlfoundations/open_clip.

    Example:
        >>> loss = livrec_fast.interop.ClipLoss()
        >>> open_clip_train.train.train_one_epoch(model, data, loss, epoch, optimizer, ...)
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        false_negative_threshold: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: must be False; ranks are torch.distributed's")
        self.world_size = world_size
        self.false_negative_threshold = false_negative_threshold
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            image_features: [B, D], of unit length, as OpenCLIP's models give them.
            text_features: [B, D], their dtype.
            logit_scale: 1 / temperature: a float, or a tensor of one element that may want a
                gradient.
            logit_bias: what all logits have in common, so that it changes nothing; its gradient
                is 0.
            output_dict: return {"contrastive_loss": loss}, as the training loop asks.

        Returns:
            0-d, or a dict of it.
        """
        if isinstance(logit_scale, Tensor):
            logit_scale = logit_scale.reshape(())
        loss_of: Callable[..., Tensor] = in_batch_contrastive
        if self.world_size > 1:
            check_world_size(self.world_size)
            loss_of = over_all_ranks
        loss = loss_of(
            image_features,
            text_features,
            temperature=1 / logit_scale,
            normalize=False,
            symmetric=True,
            false_negative_threshold=self.false_negative_threshold,
            backend=self.backend,
        )
        if isinstance(logit_bias, Tensor):
            # A gradient of 0, not none: else weight decay, say, would pass the parameter by.
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss
