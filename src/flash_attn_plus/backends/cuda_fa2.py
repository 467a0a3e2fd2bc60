"""FlashAttention-2's CUDA kernels: the original extension module, and the copy inside PyTorch.

Both mask, bias and pad alike, which this module puts right once: how they are called is left to two small classes.
"""

import os
import sys
from abc import abstractmethod
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, NamedTuple

import torch
import torch.nn.attention
from torch import Tensor

from flash_attn_plus import env
from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.backends.foreign import (
    Probe,
    compute_capability,
    diagonal,
    even_starts,
    fill_delta,
    on,
    packed_statistics,
    padded,
    slopes_of_rows,
    store_gradients,
    store_out,
    store_statistics,
    target_of,
    with_positive_scale,
)
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

MODULE = "flash_attn_2_cuda"
DROPOUT = "dropout: its random numbers follow the tiles, so no other backend could serve the backward pass"
HAS_DLSE = "a gradient of the LSE: its backward pass takes none"
_PAGE = 256  # keys; pages are multiples of it


class Fa2Call(NamedTuple):
    """A call as the kernels take it: rows 16-byte aligned, head dims equal, the scale positive."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    dq_factor: float
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    is_causal: bool
    left: int
    right: int


def _is_packed(problem: AttentionProblem) -> bool:
    """Whether the entry for packed sequences must serve: lengths differ, or dense lengths would cut a window."""
    p = problem
    has_lengths = p.is_varlen_q or p.is_varlen_k or p.page_size or p.has_seqused_k or p.has_leftpad_k
    return bool(has_lengths) or _reach(p) > p.seqlen_k


def _reach(problem: AttentionProblem) -> int:
    """The maximal length of keys to state: the kernels drop a window's side from there on, or set an open one to it."""
    is_window = problem.left >= 0 or problem.right > 0
    return max(problem.seqlen_k, problem.seqlen_q) if is_window else problem.seqlen_k


def fa2_call(problem: AttentionProblem, x: AttentionInputs) -> Fa2Call:
    """The operands of a forward or backward pass."""
    p, dim = problem, -(-max(problem.head_dim, problem.head_dim_v) // 8) * 8
    q, scale, factor = with_positive_scale(x.q, x.softmax_scale)
    q, k, v = (padded(t, dim) for t in (q, x.k, x.v))
    is_causal = p.left < 0 and p.right == 0
    band = (is_causal, p.left, -1 if is_causal else p.right)
    if not _is_packed(p):
        return Fa2Call(q, k, v, scale, factor, None, None, p.seqlen_q, p.seqlen_k, *band)
    cu_q, cu_k, max_q = x.cu_seqlens_q, x.cu_seqlens_k, p.seqlen_q
    if cu_q is None:
        q, cu_q = q.reshape(-1, *q.shape[2:]), even_starts(p.batch, p.seqlen_q, q.device)
    elif max_q == 1:
        max_q = 2  # with 1 the kernels regroup heads, and then want a query in every sequence
    if cu_k is None:
        cu_k = even_starts(p.batch, p.seqlen_k, q.device)
    if not (p.is_varlen_k or p.page_size):
        k, v = (t.reshape(-1, *t.shape[2:]) for t in (k, v))
    return Fa2Call(q, k, v, scale, factor, cu_q, cu_k, max_q, _reach(p), *band)


def _alibi_shift(problem: AttentionProblem, x: AttentionInputs) -> Tensor:
    """What the causal kernels' LSE has above the contract's, packed: they add slope * j instead of slope * (j - p)."""
    position, _, sequence = diagonal(problem, x)
    slopes = slopes_of_rows(problem, x, sequence)
    shift = slopes * (position[:, None] if sequence is None else position).float()
    return packed_statistics(shift.expand(problem.batch, -1, -1) if sequence is None else shift, sequence is not None)


class Fa2(Backend):
    """What both ways to the kernels share."""

    def common_reasons(self, problem: AttentionProblem) -> list[str]:
        """Limits of the kernels beside the capability's."""
        capability = compute_capability(problem.device)
        return (
            [] if capability >= 80 else [f"device {problem.device}: the kernels need compute capability 8.0 or later"]
        )

    @abstractmethod
    def call_forward(self, c: Fa2Call, x: AttentionInputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out, lse) in the call's form, `out` where it was given and fits."""

    @abstractmethod
    def call_backward(
        self, c: Fa2Call, x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, is_deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) in the call's form."""

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward."""
        c = fa2_call(problem, inputs)
        with on(problem.device):
            result, statistics = self.call_forward(c, inputs, target_of(out, c.q))
            store_out(out, result)
            if c.cu_q is None:
                statistics = packed_statistics(statistics, False)
            if problem.has_alibi and c.is_causal:
                statistics = statistics - _alibi_shift(problem, inputs)
            store_statistics(lse, statistics)

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """See Backend.backward; `dlse` is refused before."""
        c = fa2_call(problem, inputs)
        dim = c.q.shape[-1]
        with on(problem.device):
            fill_delta(dout, out, delta)
            statistics = packed_statistics(lse, problem.is_varlen_q)
            if problem.has_alibi and c.is_causal:
                statistics = statistics + _alibi_shift(problem, inputs)
            if c.cu_q is None:
                statistics = statistics.view(problem.heads, problem.batch, -1).transpose(0, 1).contiguous()
            packed_dout, packed_out = (padded(t.contiguous(), dim).view(c.q.shape) for t in (dout, out))
            grads = self.call_backward(c, inputs, packed_dout, packed_out, statistics, problem.is_deterministic)
            store_gradients((dq, dk, dv), grads, c.dq_factor)


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


EXTENSION = Probe(
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
        return EXTENSION.failure

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
            found = EXTENSION.value.fwd(c.q, c.k, c.v, out, x.alibi_slopes, 0.0, c.scale, *masks)
        else:
            lengths = (c.cu_q, c.cu_k, x.seqused_k, x.leftpad_k, x.block_table, x.alibi_slopes, c.max_q, c.max_k)
            found = EXTENSION.value.varlen_fwd(c.q, c.k, c.v, out, *lengths, 0.0, c.scale, False, *masks)
        return found[0], found[1]

    def call_backward(
        self, c: Fa2Call, x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, is_deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Fa2.call_backward."""
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (c.q, c.k, c.v))
        masks = (c.is_causal, c.left, c.right, x.softcap, is_deterministic, None, None)
        tensors = (dout, c.q, c.k, c.v, out, lse, *grads)
        if c.cu_q is None:
            EXTENSION.value.bwd(*tensors, x.alibi_slopes, 0.0, c.scale, *masks)
        else:
            lengths = (c.cu_q, c.cu_k, x.alibi_slopes, c.max_q, c.max_k)
            EXTENSION.value.varlen_bwd(*tensors, *lengths, 0.0, c.scale, False, *masks)
        return grads[0], grads[1], grads[2]


def _load_torch() -> Any:
    aten = torch.ops.aten
    forward, backward = aten._flash_attention_forward.default, aten._flash_attention_backward.default
    if not torch.backends.cuda.is_flash_attention_available():
        raise RuntimeError("this PyTorch is built without FlashAttention-2")
    if "rng_state" not in {r.name for r in forward._schema.returns}:
        raise RuntimeError(f"torch {torch.__version__} pads the LSE of packed sequences")
    return forward, backward


TORCH = Probe("PyTorch's FlashAttention-2", _load_torch, "install a CUDA build of PyTorch 2.7 or later")


def _replacement() -> str | None:
    """The kernels that someone put behind PyTorch's operators, whose results differ for rows without keys."""
    ask = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return ask() if ask else None


def _arguments(operator: Any) -> frozenset[str]:
    return frozenset(a.name for a in operator._schema.arguments)


class Fa2Torch(Fa2):
    """aten::_flash_attention_forward and _backward, which every CUDA build of PyTorch holds."""

    name = "torch_fa2"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        refused={
            "has_softcap": "softcap: PyTorch's operator has none",
            "has_alibi": "alibi_slopes: PyTorch builds its copy without them, though its operator has the argument",
            "has_dropout": DROPOUT,
            "has_dlse": HAS_DLSE,
            "page_size": "paged keys: not in the operator of every PyTorch",
            "has_leftpad_k": "leftpad_k: PyTorch's operator has none",
            "is_deterministic": "deterministic: PyTorch's operator knows the process's setting only",
        },
    )

    def unavailable(self) -> str | None:
        """Why the operators cannot be used, with the remedy."""
        return TORCH.failure

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability, device, and what the operators' schemas lack."""
        found = super().reasons(problem) or self.common_reasons(problem)
        if found:
            return found
        if _replacement():
            return [f"PyTorch's operator runs {_replacement()}; call torch.nn.attention.restore_flash_attention_impl()"]
        wanted = {
            "window_size_left": problem.left >= 0 or problem.right > 0,
            "seqused_k": problem.has_seqused_k,
        }
        has = _arguments(TORCH.value[problem.is_backward])
        return [
            f"{name}: not in this PyTorch's operator" for name, is_wanted in wanted.items() if is_wanted > (name in has)
        ]

    def call_forward(self, c: Fa2Call, x: AttentionInputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Fa2.call_forward."""
        options: dict[str, Any] = {"seqused_k": x.seqused_k} if x.seqused_k is not None else {}
        found = TORCH.value[0](
            c.q,
            c.k,
            c.v,
            c.cu_q,
            c.cu_k,
            c.max_q,
            c.max_k,
            0.0,
            c.is_causal,
            False,
            scale=c.scale,
            **options,
            **_window_options(c),
        )
        return found[0], found[1]

    def call_backward(
        self, c: Fa2Call, x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, is_deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Fa2.call_backward."""
        state = torch.zeros(2, dtype=torch.uint64, device=c.q.device)
        return TORCH.value[1](
            dout, c.q, c.k, c.v, out, lse, c.cu_q, c.cu_k, c.max_q, c.max_k, 0.0, c.is_causal, state, state[:1],
            scale=c.scale, **_window_options(c),
        )  # fmt: skip


def _window_options(c: Fa2Call) -> dict[str, int]:
    sides = {"window_size_left": c.left, "window_size_right": c.right}
    return {name: side for name, side in sides.items() if side >= 0}
