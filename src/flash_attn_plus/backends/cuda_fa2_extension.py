"""FlashAttention-2 by its extension module `flash_attn_2_cuda`; our drop-in's module of that name is no extension."""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch
from torch import Tensor

from flash_attn_plus import env
from flash_attn_plus.backends.base import Capability
from flash_attn_plus.backends.cuda_fa2 import DROPOUT, HAS_DLSE, Fa2, Fa2Call
from flash_attn_plus.backends.foreign import Probe
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

MODULE = "flash_attn_2_cuda"
_PAGE = 256  # keys; pages are multiples of it


def _find_extension() -> str:
    """The file of the original module: named by the environment, or installed; our module of that name is no file."""
    for path in env.cuda_libraries():
        if os.path.basename(path).startswith(MODULE):
            return path
    for folder in sys.path:
        spec = FileFinder(folder or os.curdir, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec(MODULE)
        if spec is not None and spec.origin is not None:
            return spec.origin
    raise ImportError(f"no compiled {MODULE} is installed")


def _load_extension() -> Any:
    module = sys.modules.get(MODULE)
    if not str(getattr(module, "__file__", "")).endswith(tuple(EXTENSION_SUFFIXES)):
        path = _find_extension()
        loader = ExtensionFileLoader(MODULE, path)
        module = module_from_spec(spec_from_file_location(MODULE, path, loader=loader))
        loader.exec_module(module)
    for name in ("fwd", "bwd", "varlen_fwd", "varlen_bwd"):
        getattr(module, name)
    return module


PROBE = Probe(
    "the original flash-attn",
    _load_extension,
    f"install flash-attn 2.7 or 2.8, or name its {MODULE}*.so in {env.CUDA_LIBRARIES}",
)


class Fa2Extension(Fa2):
    """flash-attn's own extension module, with the interface of its versions 2.7 and 2.8."""

    name = "fa2"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        refused={"has_dropout": DROPOUT, "has_dlse": HAS_DLSE},
    )

    def unavailable(self) -> str | None:
        """Why the module cannot be used, with the remedy."""
        return PROBE.failure

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability, device and page size."""
        found = super().reasons(problem) or self.common_reasons(problem)
        if problem.page_size % _PAGE:
            found.append(f"page size {problem.page_size} is no multiple of {_PAGE}")
        if problem.page_size and problem.head_dim % 8:
            found.append(f"head_dim {problem.head_dim} of a paged cache would have to be padded by copying it")
        return found

    def call_forward(self, c: Fa2Call, x: AttentionInputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Fa2.call_forward."""
        masks = (c.is_causal, c.left, c.right, x.softcap, False, None)
        if c.cu_q is None:
            found = PROBE.value.fwd(c.q, c.k, c.v, out, x.alibi_slopes, 0.0, c.scale, *masks)
        else:
            lengths = (c.cu_q, c.cu_k, x.seqused_k, x.leftpad_k, x.block_table, x.alibi_slopes, c.max_q, c.max_k)
            found = PROBE.value.varlen_fwd(c.q, c.k, c.v, out, *lengths, 0.0, c.scale, False, *masks)
        return found[0], found[1]

    def call_backward(
        self, c: Fa2Call, x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, is_deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Fa2.call_backward."""
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (c.q, c.k, c.v))
        masks = (c.is_causal, c.left, c.right, x.softcap, is_deterministic, None, None)
        tensors = (dout, c.q, c.k, c.v, out, lse, *grads)
        if c.cu_q is None:
            PROBE.value.bwd(*tensors, x.alibi_slopes, 0.0, c.scale, *masks)
        else:
            lengths = (c.cu_q, c.cu_k, x.alibi_slopes, c.max_q, c.max_k)
            PROBE.value.varlen_bwd(*tensors, *lengths, 0.0, c.scale, False, *masks)
        return grads[0], grads[1], grads[2]
