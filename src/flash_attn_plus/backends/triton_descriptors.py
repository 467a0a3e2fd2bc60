"""Dense tensors as descriptors, whose tiles a GPU's copy engine fetches without registers for addresses."""

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attn_plus.backends.gluon_hopper import can_copy
from flash_attn_plus.kernels.features import Features
from flash_attn_plus.tuning.config import TileConfig, padded


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """(b, s, h, d) in tiles of so many rows of one head; columns up to the padded head dim read as zeros."""
    row = 8 * x.shape[-1]  # stands for strides that are never used, but must be aligned
    strides = [stride if n > 1 else row for n, stride in zip(x.shape[:-1], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, padded(x.shape[-1])])


def streamed(
    config: TileConfig, features: Features, tensors: tuple[Tensor, Tensor], rows: int
) -> tuple[Sequence[Tensor | TensorDescriptor], Features]:
    """What a launch passes for the two tensors that a loop reads in tiles of so many rows, and its switches."""
    if not config.by_descriptor:
        return tensors, features
    return [described(x, rows) for x in tensors], features._replace(has_descriptors=True)


def forget_tensors(*descriptors: TensorDescriptor) -> tuple[TensorDescriptor, ...]:
    """Descriptors for `like`, which hold no memory."""
    return tuple(like(x, None) for x in descriptors)


def like(known: TensorDescriptor, x: Tensor | None) -> TensorDescriptor:
    """The same of another tensor of the same shape and strides, without the checks, which cost more than the rest."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(known.__dict__, base=x)
    return descriptor


def usable(configs: list[TileConfig], tensors: Sequence[Tensor]) -> list[TileConfig]:
    """Those of the configurations that the tensors' addresses and strides allow; a single one changes its ways."""
    if all(map(can_copy, tensors)):
        return configs
    return [c for c in configs if not c.by_descriptor] or [c._replace(by_descriptor=False) for c in configs]
