"""Cross-entropy loss as a module."""

from torch import nn

from flash_attn.ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """Cross-entropy of logits (n, vocabulary) with targets (n,), on any device.

    Args:
        ignore_index: target that counts for nothing.
        reduction: "mean" over the targets that count, "sum" or "none".
        label_smoothing: share of the target spread evenly over all classes.
        logit_scale: positive factor on the logits.
        lse_square_scale: weight of the squared logsumexp that is added to the loss.
        inplace_backward: the gradient overwrites the logits.
        process_group: its ranks hold equal shares of the vocabulary.
        return_z_loss: return (loss, z_loss), both reduced.

    Raises:
        NotImplementedError: another reduction.
    """

    def __init__(
        self,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        inplace_backward=False,
        process_group=None,
        return_z_loss=False,
    ):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise NotImplementedError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def _reduce(self, losses, target):
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total / (target != self.ignore_index).sum() if self.reduction == "mean" else total

    def forward(self, input, target, precomputed_lse=None):
        """Loss, float32: a scalar, or (n,) without reduction; with `return_z_loss` also the z-loss, reduced alike."""
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        loss = self._reduce(losses, target)
        return (loss, self._reduce(z_losses, target)) if self.return_z_loss else loss
