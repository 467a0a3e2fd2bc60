"""What the raw and private calls ask for beyond the engine's own rules, in the original's words."""

from torch import Tensor

from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.problem import MAX_HEAD_DIM


def check_rows(**tensors: Tensor | None) -> None:
    """All on the first one's device, with adjacent elements in the last dimension."""
    reference, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device != first.device:
            kind = "CUDA" if first.is_cuda else first.device.type
            raise InvalidArgument(f"{name} must be on {kind} ({first.device}, like {reference}), but is on {x.device}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise InvalidArgument(f"{name} must have contiguous last dimension; call .contiguous() on it")


def check_head_dim(head_dim: int, is_backward: bool) -> None:
    """A multiple of 8, since only the public functions take any head dim."""
    if is_backward:
        if head_dim > MAX_HEAD_DIM:
            raise InvalidArgument(
                f"FlashAttention backward only supports head dimension at most 256 (here at most {MAX_HEAD_DIM});"
                f" q has {head_dim}"
            )
        if head_dim % 8 != 0:
            raise InvalidArgument(f"head_size should be a multiple of 8, not {head_dim}; pad q, k and v with zeros")
    elif head_dim % 8 != 0 and head_dim <= MAX_HEAD_DIM:
        raise InvalidArgument(
            f"query, key and value must have a head_size that is a multiple of 8, not {head_dim};"
            " pad them with zeros, or call the public functions, which take any head dim"
        )


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    """The result in the caller's buffer when there is one."""
    if out is None:
        return result
    if out.dtype != result.dtype:
        raise InvalidArgument(f"query and out must have the same dtype: out has {out.dtype}, q has {result.dtype}")
    if out.shape != result.shape:
        raise InvalidArgument(f"out must have shape {tuple(result.shape)}, not {tuple(out.shape)}")
    return out.copy_(result)
