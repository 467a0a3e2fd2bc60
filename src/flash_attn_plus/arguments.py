"""Numbers as callers pass them (NumPy scalars, 0-dim tensors, pairs of any kind) as the plain ones the engine takes."""

from typing import Any, cast

import torch
from torch import Tensor

from flash_attn_plus.errors import InvalidArgument


def as_integer(name: str, value: Any) -> int:
    """The value as an int; symbolic sizes of torch.compile stay what they are."""
    if type(value) is int or isinstance(value, (int, torch.SymInt)):  # the first takes a third of the second's time
        return cast("int", value)
    try:
        number = int(value)
        is_same = not isinstance(value, str) and bool(number == value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        is_same = False
    if not is_same:
        raise InvalidArgument(f"{name} must be an integer, not {value!r}")
    return number


def as_number(name: str, value: Any) -> float:
    """The value as a float, read now: of a tensor, a remembered plan would keep the identity and miss its changes."""
    if type(value) is float or isinstance(value, torch.SymFloat):
        return cast("float", value)
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument(f"{name} gets no gradient; detach it, and let what is learned be a factor of q")
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise InvalidArgument(f"{name} must be a number, not {value!r}")


def window_bounds(window_size: Any, causal: bool) -> tuple[int, int]:
    """(left, right) as integers; causal overrides the right bound only."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise InvalidArgument(f"window_size must be a pair (left, right), not {window_size!r}") from None
    left, right = as_integer("window_size", left), as_integer("window_size", right)
    return left, 0 if causal else right


def as_length(name: str, value: Any, cu_seqlens: Tensor | None) -> int:
    """A maximal length as the integer that sizes grids; required with cu_seqlens."""
    if value is None:
        if cu_seqlens is not None:
            raise InvalidArgument(f"{name} is required with cu_seqlens; pass the longest sequence's length as an int")
        return 0
    length = as_integer(name, value)
    if type(length) is int and length < 0:
        raise InvalidArgument(f"{name} must not be negative, but is {length}")
    return length


def resolve_scale(softmax_scale: Any, q: Tensor) -> float:
    """The factor on q k^T, d ** -0.5 unless given; a head dim of 0, which checks refuse, gets one too."""
    if softmax_scale is not None:
        return as_number("softmax_scale", softmax_scale)
    head_dim = q.shape[-1]
    return head_dim**-0.5 if head_dim else 1.0


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the active autocast region of the device type; None outside one, and for meta, which knows none."""
    kind = device.type  # each look at it takes longer than all else here
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
