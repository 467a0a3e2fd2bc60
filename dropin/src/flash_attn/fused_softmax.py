"""Scaled and masked softmax of attention scores, in float32 inside and the input's dtype outside."""

import torch
from torch import nn

_MASKED = -10000.0  # what a masked score is set to, so that a row without any visible key stays finite


def scaled_upper_triang_masked_softmax(inputs, _, scale):
    """Softmax over the keys up to the query's own of scale * inputs, (b, s, s); the second argument is not used."""
    visible = torch.ones(inputs.shape[-2:], dtype=torch.bool, device=inputs.device).tril()
    return (inputs.float() * scale).masked_fill(~visible, float("-inf")).softmax(-1).to(inputs.dtype)


def scaled_masked_softmax(inputs, mask, scale):
    """Softmax of scale * inputs (b, h, sq, sk), where `mask` (b, 1, sq, sk), True = hidden, sets scores to -10000."""
    return (inputs.float() * scale).masked_fill(mask.bool(), _MASKED).softmax(-1).to(inputs.dtype)


class FusedScaleMaskSoftmax(nn.Module):
    """Scale, mask and softmax of attention scores (b, h, sq, sk).

    Args:
        input_in_fp16, input_in_bf16: what the scores' dtype is; at most one.
        attn_mask_type: causal if its name is "causal", else the mask given to `forward` counts.
        scaled_masked_softmax_fusion: a choice of implementation; has no influence here.
        mask_func: used in place of masking with -10000, as mask_func(scores, mask).
        softmax_in_fp32: compute in float32; always so here.
        scale: factor on the scores, or None.
    """

    def __init__(
        self,
        input_in_fp16,
        input_in_bf16,
        attn_mask_type,
        scaled_masked_softmax_fusion,
        mask_func,
        softmax_in_fp32,
        scale,
    ):
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise RuntimeError("input_in_fp16 and input_in_bf16 exclude each other; set one of them")
        if not (scale is None or softmax_in_fp32):
            raise RuntimeError("a scale needs softmax_in_fp32=True")
        self.attn_mask_type = attn_mask_type
        self.mask_func = mask_func
        self.scale = scale

    def forward(self, input, mask):
        """Probabilities in the input's dtype; `mask` is True where hidden, or None."""
        assert input.dim() == 4, "scores must be (b, h, sq, sk)"
        scale = 1.0 if self.scale is None else self.scale
        if getattr(self.attn_mask_type, "name", self.attn_mask_type) == "causal":
            assert input.shape[-2] == input.shape[-1], "causal mask is only for self attention"
            return scaled_upper_triang_masked_softmax(input.flatten(0, 1), None, scale).view_as(input)
        scores = input.float() * scale
        if mask is not None:
            hide = self.mask_func
            scores = scores.masked_fill(mask, _MASKED) if hide is None else hide(scores, mask)
        return scores.softmax(-1).to(input.dtype)
