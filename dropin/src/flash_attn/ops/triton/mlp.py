"""MLP with squared ReLU."""

import torch
from torch import nn

from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.fused.dense import mlp_backward, mlp_forward


class FusedDenseSqreluDenseFunc(torch.autograd.Function):
    """linear2(relu(linear1(x))^2) with biases, keeping what `checkpoint_lvl` (0, 1 or 2) says."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, checkpoint_lvl=0):
        assert checkpoint_lvl in (0, 1, 2), f"checkpoint_lvl must be 0, 1 or 2, not {checkpoint_lvl!r}"
        return mlp_forward(ctx, x, weight1, bias1, weight2, bias2, "squared_relu", checkpoint_lvl=checkpoint_lvl)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return *mlp_backward(ctx, grad_output), None


fused_dense_sqrelu_dense_function = FusedDenseSqreluDenseFunc.apply


class FusedDenseSqreluDense(nn.Module):
    """Two linear layers, `fc1` and `fc2`, around a squared ReLU; both have a bias."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        bias1=True,
        bias2=True,
        checkpoint_lvl=0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        assert checkpoint_lvl in (0, 1, 2), f"checkpoint_lvl must be 0, 1 or 2, not {checkpoint_lvl!r}"
        assert bias1, "FusedDenseSqreluDense needs bias1=True; use flash_attn.ops.fused_dense.FusedMLP without a bias"
        assert bias2, "FusedDenseSqreluDense needs bias2=True; use flash_attn.ops.fused_dense.FusedMLP without a bias"
        hidden_features = hidden_features if hidden_features is not None else in_features * 4
        out_features = out_features if out_features is not None else in_features
        self.checkpoint_lvl = checkpoint_lvl
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)."""
        return fused_dense_sqrelu_dense_function(
            x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.checkpoint_lvl
        )
