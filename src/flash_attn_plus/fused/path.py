"""Which implementation serves a fused operation: the Triton kernels or plain PyTorch."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from flash_attn_plus.backends.triton_portable import is_interpreted
from flash_attn_plus.dispatch import may_skip_dispatcher
from flash_attn_plus.errors import NoBackend
from flash_attn_plus.selection import forced_backend

_CPU_LIKE = frozenset({"cpu", "meta", "mps"})  # device types that Triton does not compile for


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # an import hook hides it
        return False


HAS_TRITON = _is_installed("triton")


def _refusal(x: Tensor) -> str | None:
    """Why the Triton kernels do not serve a tensor, with the remedy; None when they do."""
    if not HAS_TRITON:
        return "Triton is not installed; install the triton package (it comes with PyTorch's GPU builds)"
    if x.dtype == torch.float64:
        return "the kernels accumulate in float32; float64 runs in PyTorch"
    if x.device.type in _CPU_LIKE and not (x.device.type == "cpu" and is_interpreted()):
        return f"device {x.device.type}: Triton reaches CPU tensors only with TRITON_INTERPRET=1"
    return None


def uses_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve operations on x.

    GPU tensors go to Triton and the rest to PyTorch; `use_backend` or FLASH_ATTENTION_BACKEND ask for one of the two
    by name ("triton", "torch"), and asking for Triton where it cannot serve raises NoBackend.
    """
    forced = forced_backend()
    if forced == "torch":
        return False
    refusal = _refusal(x)
    if forced == "triton" and refusal:
        raise NoBackend(f"backend 'triton' cannot serve this call: {refusal}")
    return refusal is None and (forced == "triton" or x.device.type != "cpu")


_NOTHING: AbstractContextManager = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager:
    """Make x's device current: Triton launches on the current one."""
    if x.device.type in _CPU_LIKE:
        return _NOTHING
    module = torch.cuda if x.device.type == "cuda" else torch.get_device_module(x.device)
    if x.device.index is None or x.device.index == module.current_device():
        return _NOTHING
    return module.device(x.device)


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether to call an operator's implementation itself, of which a parameter is as good an argument as a tensor."""
    return not torch.compiler.is_compiling() and may_skip_dispatcher(
        *(x for x in tensors if x is not None and type(x) is not torch.nn.Parameter)
    )
