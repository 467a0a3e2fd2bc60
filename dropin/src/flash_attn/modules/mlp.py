"""Feed-forward layers, plain and gated, serial and tensor-parallel."""

import torch.nn.functional as F
from torch import nn

from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedMLP, ParallelFusedMLP, RowParallelLinear

__all__ = ["FusedMLP", "GatedMlp", "Mlp", "ParallelFusedMLP", "ParallelGatedMlp", "ParallelMLP"]


class Mlp(nn.Module):
    """fc2(activation(fc1(x))); hidden_features defaults to 4 * in_features."""

    def __init__(
        self, in_features, hidden_features=None, out_features=None, activation=F.gelu, bias1=True, bias2=True,
        return_residual=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        out_features = out_features if out_features is not None else in_features
        hidden_features = hidden_features if hidden_features is not None else in_features * 4
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x):
        """(..., in_features) -> (..., out_features), or (that, x) with `return_residual`."""
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class ParallelMLP(nn.Module):
    """`Mlp` with column-parallel `fc1` and row-parallel `fc2`; `process_group` is required."""

    def __init__(
        self, in_features, hidden_features=None, out_features=None, activation=F.gelu, process_group=None,
        sequence_parallel=True, bias1=True, bias2=True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        assert process_group is not None, "process_group must be passed"
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        out_features = out_features if out_features is not None else in_features
        hidden_features = hidden_features if hidden_features is not None else in_features * 4
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, process_group, bias=bias1, **options)
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features, process_group, bias=bias2, **options)

    def forward(self, x):
        """x (n, in_features), a share of the rows when sequence-parallel, as is the result."""
        return self.fc2(self.activation(self.fc1(x)))


def _gated_hidden(in_features, hidden_features, multiple_of):
    """Hidden features, by default two thirds of a plain MLP's, rounded up to `multiple_of`."""
    hidden = hidden_features if hidden_features is not None else int(8 * in_features / 3)
    return (hidden + multiple_of - 1) // multiple_of * multiple_of


def _gate(y, activation):
    """value * activation(gate) of y = [value, gate]."""
    if activation is F.sigmoid:
        return F.glu(y, dim=-1)
    value, gate = y.chunk(2, dim=-1)
    return swiglu(gate, value) if activation is F.silu else value * activation(gate)


class GatedMlp(nn.Module):
    """fc2(value * activation(gate)) with value and gate the first and second half of fc1(x).

    hidden_features defaults to int(8 * in_features / 3); in any case it is rounded up to `multiple_of`.
    """

    def __init__(
        self, in_features, hidden_features=None, out_features=None, activation=F.sigmoid, bias1=True, bias2=True,
        multiple_of=128, return_residual=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        out_features = out_features if out_features is not None else in_features
        hidden_features = _gated_hidden(in_features, hidden_features, multiple_of)
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias1, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x):
        """(..., in_features) -> (..., out_features), or (that, x) with `return_residual`."""
        y = self.fc2(_gate(self.fc1(x), self.activation))
        return (y, x) if self.return_residual else y


class ParallelGatedMlp(nn.Module):
    """`GatedMlp` with column-parallel `fc1`, each rank holding the gates of its values, and row-parallel `fc2`."""

    def __init__(
        self, in_features, process_group, hidden_features=None, out_features=None, activation=F.sigmoid, bias1=True,
        bias2=True, multiple_of=128, sequence_parallel=True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        out_features = out_features if out_features is not None else in_features
        hidden_features = _gated_hidden(in_features, hidden_features, multiple_of)
        # Units of two, so that the halves of a rank's rows are its values and their gates.
        self.fc1 = ColumnParallelLinear(
            in_features, 2 * hidden_features, process_group, bias=bias1, multiple_of=2, **options
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features, process_group, bias=bias2, **options)

    def forward(self, x):
        """x (n, in_features), a share of the rows when sequence-parallel, as is the result."""
        return self.fc2(_gate(self.fc1(x), self.activation))
