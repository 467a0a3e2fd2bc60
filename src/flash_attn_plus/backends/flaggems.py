"""The FlagGems backend: forward passes by FlagGems' Triton operators, which run on accelerators of a dozen vendors.

Of FlagGems' attention only `flash_attn_varlen_func` gives right results, and only for the calls that are let through
here; its backward passes do not. Dense calls go in as sequences of equal lengths, contiguous caches as pages.

Importing flag_gems reads the machine's devices, creates ~/.flaggems, sets FLAGGEMS_SOURCE_DIR, appends to the import
path and defines operators in the namespaces of vLLM's extensions where those are missing. Therefore it happens only
when FlagGems is asked for, and `flag_gems.enable()`, which replaces PyTorch's own operators, is never called.
"""

import importlib
import importlib.util
import warnings
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.backends.foreign import (
    Probe,
    diagonal,
    even_starts,
    on,
    padded,
    require_version,
    slopes_of_rows,
    store_out,
    store_statistics,
    target_of,
    with_positive_scale,
)
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

OLDEST, BELOW = (5, 0), (5, 1)
OLDEST_TRITON, BELOW_TRITON = (3, 3), (3, 7)  # 3.7 and later crash at the second launch of a FlagGems kernel
REMEDY = (
    'install it with pip install --no-deps "flag_gems==5.0.2" pyyaml sqlalchemy packaging, beside Triton 3.3 to 3.6'
)
# By FlagGems' own lists of failing operators, or because their variant takes paged keys only.
UNPROVEN_VENDORS = frozenset({"hygon", "kunlunxin", "metax", "mthreads", "tsingmicro"})
_OPEN = 2**30  # a window's open side: beyond any key, and one number for all calls, for which kernels compile once
_INDEX_LIMIT = 2**31  # FlagGems counts elements in int32
_SMALLEST_DIM = 16  # of Triton's products


def _load() -> Any:
    require_version("flag_gems", metadata.version("flag_gems"), OLDEST, BELOW)
    require_version("triton", importlib.import_module("triton").__version__, OLDEST_TRITON, BELOW_TRITON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("flag_gems")
    for name in ("flash_attn_varlen_func", "device", "vendor_name"):
        getattr(module, name)
    return module


PROBE = Probe("FlagGems", _load, REMEDY)


def _keys_are_pages(problem: AttentionProblem) -> bool:
    return problem.page_size > 0 or (problem.has_seqused_k and not problem.is_varlen_k)


def window(problem: AttentionProblem) -> tuple[bool, tuple[int, int], int]:
    """(causal, window_size, max_seqlen_k) with which FlagGems masks by the problem's band.

    Its own clamps drop one side of a window along with the other; a maximal length beyond every bound avoids them.
    """
    left, right = problem.left, problem.right
    if left < 0 and right < 0:
        # One query sees every key, so (-1, 0) hides nothing; it keeps FlagGems from regrouping heads, which scrambles
        # the LSE and fails for empty sequences.
        return False, ((-1, 0) if problem.seqlen_q == 1 else (-1, -1)), problem.seqlen_k
    if left < 0 and right == 0:
        return True, (-1, 0), problem.seqlen_k
    return False, (left if left >= 0 else _OPEN, right if right >= 0 else _OPEN), _OPEN + 1


class FlagGems(Backend):
    """Forward passes in float16 and bfloat16: dense, packed, paged, windows, softcap and ALiBi."""

    name = "flaggems"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        refused={
            "is_backward": "gradients: FlagGems' backward kernels give wrong results",
            "has_dropout": "dropout: FlagGems does not scale the weights it keeps, nor can its mask be replayed",
            "has_leftpad_k": "leftpad_k: FlagGems has no such argument",
            "is_batch_invariant": "batch invariance: not promised by FlagGems",
        },
    )

    def dormant(self) -> str | None:
        """See Backend.dormant: whether the package is there is told without importing it."""
        if importlib.util.find_spec("flag_gems") is None:
            return f"FlagGems not available: flag_gems is not installed; {REMEDY}"
        return "FlagGems is installed, but imported only when asked for: set FLASH_ATTENTION_USE_FLAGGEMS=TRUE"

    def unavailable(self) -> str | None:
        """Why flag_gems cannot be used, with the remedy."""
        if PROBE.failure:
            return PROBE.failure
        vendor = PROBE.value.vendor_name
        return f"FlagGems' attention is not proven on devices of {vendor}" if vendor in UNPROVEN_VENDORS else None

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability, device, and the forms of keys that FlagGems reads right."""
        found = self.capability.reasons(problem)
        if found:
            return found  # told without importing FlagGems
        if problem.device.type == "cpu":
            return ["device cpu: FlagGems runs on accelerators only"]
        missing = self.unavailable()
        if missing:
            return [missing]
        if problem.device.type != PROBE.value.device:
            found.append(f"device {problem.device.type} is not FlagGems' device, {PROBE.value.device}")
        if problem.head_dim_v != problem.head_dim:
            found.append(f"head_dim_v {problem.head_dim_v} is not head_dim {problem.head_dim}")
        if problem.has_seqused_k and problem.is_varlen_k:
            found.append("seqused_k beside cu_seqlens_k: FlagGems takes one of them")
        if _keys_are_pages(problem) and (problem.head_dim % 8 or problem.head_dim < _SMALLEST_DIM):
            found.append(f"head_dim {problem.head_dim} of a cache would have to be padded by copying it")
        return found

    def input_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Sizes and strides that its 32-bit offsets and its assumption of adjacent pages cannot reach."""
        q, k, v = inputs.q, inputs.k, inputs.v
        found = []
        for name, x in (("q", q), ("k", k), ("v", v)):
            if sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) >= _INDEX_LIMIT:
                found.append(f"{name} spans 2^31 elements or more")
        if k.ndim == 4 and (inputs.block_table is not None or inputs.seqused_k is not None):
            if k.stride() != v.stride():
                found.append(f"k and v have different strides, {k.stride()} and {v.stride()}")
            if k.stride(0) != k.shape[1] * k.stride(1):
                found.append(f"pages of k lie {k.stride(0)} elements apart, not {k.shape[1] * k.stride(1)}")
        return found

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward; one FlagGems kernel, and copies where it cannot read or write in place."""
        q, keys = _operands(problem, inputs)
        q, scale, _ = with_positive_scale(q, inputs.softmax_scale)
        is_causal, window_size, max_seqlen_k = window(problem)
        with on(problem.device):
            starts = inputs.cu_seqlens_q
            if starts is None:
                starts = even_starts(problem.batch, problem.seqlen_q, q.device)
            result, statistics = PROBE.value.flash_attn_varlen_func(
                q=q, **keys, max_seqlen_q=problem.seqlen_q, cu_seqlens_q=starts, max_seqlen_k=max_seqlen_k,
                softmax_scale=scale, causal=is_causal, window_size=window_size, softcap=inputs.softcap,
                alibi_slopes=inputs.alibi_slopes, return_softmax_lse=True, out=target_of(out, q),
            )  # fmt: skip
            store_out(out, result)
            store_statistics(lse, statistics)
            if problem.has_alibi and is_causal:
                _correct_alibi(problem, inputs, lse)

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """Never asked for: `reasons` refuses every backward problem."""
        raise NotImplementedError("FlagGems serves no gradients")


def _operands(problem: AttentionProblem, x: AttentionInputs) -> tuple[Tensor, dict[str, Any]]:
    """q (total_q, h, d), and the arguments that give the keys: packed, or pages with their table."""
    dim = max(_SMALLEST_DIM, -(-problem.head_dim // 8) * 8)
    q = padded(x.q, dim)
    q = q if problem.is_varlen_q else q.reshape(-1, *q.shape[2:])
    if _keys_are_pages(problem):
        table, used = x.block_table, x.seqused_k
        if table is None:  # a row of a contiguous cache is one page
            table = torch.arange(problem.batch, dtype=torch.int32, device=q.device)[:, None]
        if used is None:
            used = x.cu_seqlens_k.diff()
        return q, {"k": x.k, "v": x.v, "seqused_k": used, "block_table": table}
    k, v = (padded(t, dim) for t in (x.k, x.v))
    starts = x.cu_seqlens_k
    if starts is None:
        starts = even_starts(problem.batch, problem.seqlen_k, q.device)
        k, v = (t.reshape(-1, *t.shape[2:]) for t in (k, v))
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return q, {"k": k, "v": v, "cu_seqlens_k": starts}


def _correct_alibi(problem: AttentionProblem, inputs: AttentionInputs, lse: Tensor) -> None:
    """FlagGems' causal kernel measures distances from the last query; the LSE counts from each query's own."""
    position, len_k, sequence = diagonal(problem, inputs)
    below = (len_k - 1 - position).float()
    lse += slopes_of_rows(problem, inputs, sequence) * (below[:, None] if sequence is None else below)
