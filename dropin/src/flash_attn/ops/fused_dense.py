"""Dense layers and MLPs with their bias and activation, serial and tensor-parallel."""

from torch import nn

from flash_attn_plus.fused.collective import AllReduce, ReduceScatter
from flash_attn_plus.fused.dense import LinearFunction as FusedDenseFunc
from flash_attn_plus.fused.dense import MLPFunction as FusedMLPFunc
from flash_attn_plus.fused.dense import linear, share_of

_ACTIVATIONS = {"gelu_approx": "gelu_approx", "relu": "relu", "sqrelu": "squared_relu"}


def fused_dense_func(x, weight, bias=None, return_residual=False, process_group=None, sequence_parallel=True):
    """x @ weight.T + bias; see `FusedDense` and `ColumnParallelLinear`.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features); with `process_group` this rank's share of the output features.
        return_residual: also return x, whose gradient is then added inside the input's matrix multiplication.
        sequence_parallel: with `process_group`, x is gathered along its first dimension.
    """
    return linear(x, weight, bias, return_residual, process_group, sequence_parallel)


class FusedDense(nn.Linear):
    """nn.Linear that can return its input too and run column-parallel."""

    def __init__(self, in_features, out_features, bias=True, return_residual=False, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x, process_group=None):
        """out, or (out, x) with `return_residual`; with `process_group` x is gathered along its first dimension."""
        return fused_dense_func(x, self.weight, self.bias, self.return_residual, process_group)


class ColumnParallelLinear(nn.Linear):
    """This rank's share of the output features, in units of `multiple_of`; the first ranks may have a unit more.

    Raises:
        ValueError: out_features is not divisible by multiple_of.
    """

    def __init__(
        self,
        in_features,
        out_features,
        process_group,
        bias=True,
        sequence_parallel=True,
        multiple_of=1,
        device=None,
        dtype=None,
    ):
        share = share_of(out_features, process_group.size(), process_group.rank(), multiple_of)
        super().__init__(in_features, share, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x):
        """x (n, ...) is gathered along its first dimension first when sequence-parallel."""
        return fused_dense_func(
            x, self.weight, self.bias, process_group=self.process_group, sequence_parallel=self.sequence_parallel
        )


def _reduce(out, process_group, sequence_parallel):
    return (ReduceScatter if sequence_parallel else AllReduce).apply(out, process_group)


class RowParallelLinear(nn.Linear):
    """This rank's share of the input features, in units of `multiple_of`; only rank 0 has a bias.

    Raises:
        ValueError: in_features is not divisible by multiple_of.
    """

    def __init__(
        self,
        in_features,
        out_features,
        process_group,
        bias=True,
        sequence_parallel=True,
        multiple_of=1,
        device=None,
        dtype=None,
    ):
        rank = process_group.rank()
        share = share_of(in_features, process_group.size(), rank, multiple_of)
        super().__init__(share, out_features, bias=bias and rank == 0, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x):
        """The sum over ranks, scattered along the first dimension when sequence-parallel."""
        return _reduce(fused_dense_func(x, self.weight, self.bias), self.process_group, self.sequence_parallel)


def _check_options(activation, checkpoint_lvl, heuristic):
    assert activation in _ACTIVATIONS, f"activation must be one of {', '.join(_ACTIVATIONS)}, not {activation!r}"
    assert checkpoint_lvl in (0, 1, 2), f"checkpoint_lvl must be 0, 1 or 2, not {checkpoint_lvl!r}"
    assert heuristic == "auto" or heuristic in range(-1, 5), f"heuristic must be 'auto' or -1..4, not {heuristic!r}"


def fused_mlp_func(
    x,
    weight1,
    weight2,
    bias1=None,
    bias2=None,
    activation="gelu_approx",
    save_pre_act=True,
    return_residual=False,
    checkpoint_lvl=0,
    heuristic=0,
    process_group=None,
    sequence_parallel=True,
):
    """linear2(act(linear1(x))).

    Args:
        activation: "gelu_approx", "relu" or "sqrelu".
        save_pre_act: False keeps neither pre-activation nor activation, as `checkpoint_lvl=2`.
        checkpoint_lvl: 0 keeps everything for the backward pass, 1 recomputes the activation, 2 the first layer too.
        heuristic: a matrix-multiplication algorithm of the original; has no influence here.
        process_group: weight1 holds this rank's hidden features; the result is this rank's part of a sum.
    """
    _check_options(activation, checkpoint_lvl, heuristic)
    return FusedMLPFunc.apply(
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        _ACTIVATIONS[activation],
        save_pre_act,
        return_residual,
        checkpoint_lvl,
        heuristic,
        process_group,
        sequence_parallel,
    )


class FusedMLP(nn.Module):
    """Two linear layers, `fc1` and `fc2`, around an activation; see `fused_mlp_func`."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        bias1=True,
        bias2=True,
        activation="gelu_approx",
        return_residual=False,
        checkpoint_lvl=0,
        heuristic="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_options(activation, checkpoint_lvl, heuristic)
        hidden_features = hidden_features if hidden_features is not None else in_features * 4
        out_features = out_features if out_features is not None else in_features
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x, process_group=None):
        """out, or (out, x) with `return_residual`; with `process_group` the result is summed over its ranks."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            return_residual=self.return_residual,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
            process_group=process_group,
        )
        if process_group is None:
            return out
        if self.return_residual:
            return ReduceScatter.apply(out[0], process_group), out[1]
        return ReduceScatter.apply(out, process_group)


class ParallelFusedMLP(nn.Module):
    """`FusedMLP` with column-parallel `fc1` and row-parallel `fc2`; `process_group` is required."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        activation="gelu_approx",
        process_group=None,
        bias1=True,
        bias2=True,
        sequence_parallel=True,
        checkpoint_lvl=0,
        heuristic="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_options(activation, checkpoint_lvl, heuristic)
        assert process_group is not None, "process_group must be passed"
        hidden_features = hidden_features if hidden_features is not None else in_features * 4
        out_features = out_features if out_features is not None else in_features
        factory = {"device": device, "dtype": dtype}
        self.activation = activation
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, process_group, bias=bias1, **factory)
        self.fc2 = RowParallelLinear(hidden_features, out_features, process_group, bias=bias2, **factory)

    def forward(self, x):
        """x (n, in_features), a share of the rows when sequence-parallel, as is the result."""
        out = fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )
        return _reduce(out, self.process_group, self.sequence_parallel)


__all__ = [
    "ColumnParallelLinear",
    "FusedDense",
    "FusedDenseFunc",
    "FusedMLP",
    "FusedMLPFunc",
    "ParallelFusedMLP",
    "RowParallelLinear",
    "fused_dense_func",
    "fused_mlp_func",
]
