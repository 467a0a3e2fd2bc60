"""When a call may go straight to its implementation: PyTorch's dispatcher costs more host time than a plan."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:  # none of these is public; without one of them every call goes through the dispatcher
    _modes = torch._C._len_torch_dispatch_stack
    _transforms = torch._C._functorch.peek_interpreter_stack
    _tracing = torch._C._get_tracing_state
    _profiler = torch.autograd.profiler
    _unwrap = torch._C._functorch.unwrap_if_dead
    _apply = torch._C._FunctionBase.__dict__["apply"]
    _CAN_TELL = isinstance(_profiler._is_profiler_enabled, bool) and isinstance(forward_ad._current_level, int)
except AttributeError:
    _CAN_TELL = False


def apply(function: type[torch.autograd.Function], q: Tensor, k: Tensor, v: Tensor, *options: object):
    """function.apply(q, k, v, *options), past Python's part of it, which takes as long as the rest: for transforms."""
    if torch.compiler.is_compiling() or not _CAN_TELL or _transforms() is not None:
        return function.apply(q, k, v, *options)
    return _apply.__get__(None, function)(_unwrap(q), _unwrap(k), _unwrap(v), *options)


def may_skip_dispatcher(*tensors: Tensor) -> bool:
    """Whether nobody between caller and implementation would notice: modes, subclasses, transforms, tracers, profilers.

    Tensors that need gradients go through the operator too, which knows none.
    """
    if not _CAN_TELL or _modes() or _transforms() is not None or _tracing() is not None:
        return False
    if _profiler._is_profiler_enabled or forward_ad._current_level >= 0:
        return False
    is_recording = torch.is_grad_enabled()
    for x in tensors:  # a loop takes half the time of any()
        if type(x) is not Tensor or x.is_meta or x.is_neg() or (is_recording and x.requires_grad):
            return False
    return True
