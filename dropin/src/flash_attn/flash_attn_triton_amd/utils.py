"""Which AMD device this is, as callers ask the original."""

import torch

from flash_attn.flash_attn_interface import USE_TRITON_ROCM
from flash_attn_plus.device import probe

__all__ = ["USE_TRITON_ROCM", "is_cdna", "is_hip", "is_rdna"]


def is_hip() -> bool:
    """Whether the current device is an AMD one."""
    return torch.version.hip is not None and torch.cuda.is_available()


def is_cdna() -> bool:
    """Whether it is one for data centres."""
    return is_hip() and probe(torch.device("cuda", torch.cuda.current_device())).family == "cdna"


def is_rdna() -> bool:
    """Whether it is one for graphics."""
    return is_hip() and probe(torch.device("cuda", torch.cuda.current_device())).family == "rdna"
