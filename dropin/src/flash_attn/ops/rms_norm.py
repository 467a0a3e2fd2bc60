"""The functions of `flash_attn.ops.layer_norm` with RMS norm."""

import torch
from torch import nn

from flash_attn.ops.layer_norm import _parallel_residual, _plain, _subset
from flash_attn.ops.triton.layer_norm import rms_norm_fn


def rms_norm(x, weight, epsilon):
    """RMS norm over the last dimension."""
    return rms_norm_fn(x, weight, None, eps=epsilon)


def dropout_add_rms_norm(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    rowscale=None,
    layerscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """See `flash_attn.ops.layer_norm.dropout_add_layer_norm`."""
    return _plain(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, True,
    )  # fmt: skip


def dropout_add_rms_norm_subset(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    layerscale=None,
    x0_subset=None,
    out_subset=None,
    rowscale_const=1.0,
    out_numrows=0,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """See `flash_attn.ops.layer_norm.dropout_add_layer_norm_subset`."""
    return _subset(
        x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset, rowscale_const,
        out_numrows, prenorm, residual_in_fp32, return_dropout_mask, True,
    )  # fmt: skip


def dropout_add_rms_norm_parallel_residual(
    x0,
    x1,
    residual,
    weight0,
    bias0,
    weight1,
    bias1,
    dropout_p,
    epsilon,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """See `flash_attn.ops.layer_norm.dropout_add_layer_norm_parallel_residual`."""
    return _parallel_residual(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm, residual_in_fp32,
        return_dropout_mask, True,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """RMS norm with its weight."""

    def __init__(self, hidden_size, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x):
        """(..., hidden_size) -> the same shape."""
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(nn.Module):
    """`dropout_add_rms_norm` with its weight; dropout in training only."""

    def __init__(self, hidden_size, prenorm=False, p=0.0, eps=1e-5, residual_in_fp32=False, device=None, dtype=None):
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x0, residual=None):
        """z, or (z, t) with prenorm."""
        return dropout_add_rms_norm(
            x0,
            residual,
            self.weight,
            None,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
