"""FlashAttention-3's CUDA kernels, forward: an operator of libraries, called by the names that its schema gives.

The schema differs between releases and between the original's library and vLLM's; what a call does not use gets the
schema's default, or what means "not used".
"""

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from flash_attn_plus import env
from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.backends.foreign import (
    Probe,
    compute_capability,
    even_starts,
    on,
    padded,
    store_out,
    store_statistics,
    target_of,
    with_positive_scale,
    without_trailing,
)
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

# module that registers an operator -> the operator's namespace
_MODULES = {"flash_attn_3._C": "flash_attn_3", "vllm.vllm_flash_attn._vllm_fa3_C": "_vllm_fa3_C"}
_NEEDED = frozenset({"q", "k", "v", "softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap"})
# Arguments without a default in some release -> what leaves them unused.
_UNUSED = {
    "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
    "attention_chunk": 0,
}  # fmt: skip


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing, or has no spec
        return False


def _load() -> Any:
    for path in env.cuda_libraries():
        if "fa3" in os.path.basename(path) or "flash_attn_3" in path:
            torch.ops.load_library(path)
            namespace = next((n for n in _MODULES.values() if hasattr(getattr(torch.ops, n), "fwd")), None)
            if namespace is None:
                raise RuntimeError(f"{os.path.basename(path)} registers no operator of FlashAttention-3")
            break
    else:
        modules = [m for m in _MODULES if _is_installed(m)]
        if not modules:
            raise ImportError("neither flash_attn_3 nor vLLM is installed")
        importlib.import_module(modules[0])
        namespace = _MODULES[modules[0]]
    operator = getattr(torch.ops, namespace).fwd.default
    missing = _NEEDED - {a.name for a in operator._schema.arguments}
    if missing:
        raise RuntimeError(f"its operator has another interface, without {', '.join(sorted(missing))}")
    return operator


PROBE = Probe("FlashAttention-3", _load, f"install flash-attn-3, or name its library in {env.CUDA_LIBRARIES}")


def arguments(schema: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Every argument of the schema by name: the given ones, and for the rest the default or what leaves it unused."""
    names = {a.name for a in schema.arguments}
    strangers = [name for name, value in given.items() if value is not None and name not in names]
    if strangers:
        raise RuntimeError(f"FlashAttention-3's operator here has no argument {', '.join(strangers)}")
    rest = {a.name: _UNUSED.get(a.name) for a in schema.arguments if not a.has_default_value() and a.name not in given}
    return {name: value for name, value in given.items() if name in names} | rest


class Fa3(Backend):
    """Forward passes on Hopper, dense and packed, with softcap.

    Its kernels multiply values of keys that are not there by weights of 0, which spoils rows where those are NaN.
    Therefore packed keys are copied without what follows the last sequence, and caches are left to other engines.
    Left windows of 200 keys came out wrong by up to 0.5 at head dims 96, 128 and 256, so these are left to them too.
    """

    name = "fa3"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        refused={
            "is_backward": "gradients: no library of FlashAttention-3 with a backward pass was checked",
            "has_alibi": "alibi_slopes: FlashAttention-3 has none",
            "has_dropout": "dropout: FlashAttention-3 has none",
            "page_size": "paged keys: NaN in a page's unused part would reach the output",
            "has_seqused_k": "seqused_k: NaN in the unused part of a cache would reach the output",
            "has_leftpad_k": "leftpad_k: not checked",
        },
    )

    def unavailable(self) -> str | None:
        """Why the operator cannot be used, with the remedy."""
        return PROBE.failure

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability and device."""
        found = self.capability.reasons(problem)
        if compute_capability(problem.device) != 90:
            found.append(f"device {problem.device} is not of compute capability 9.0")
        if problem.head_dim_v != problem.head_dim:
            found.append(f"head_dim_v {problem.head_dim_v} is not head_dim {problem.head_dim}")
        if problem.left >= 0:
            found.append("window_size[0]: FlashAttention-3's results under left windows were wrong when checked")
        missing = None if found else self.unavailable()
        return [missing] if missing else found

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward."""
        p, x, dim = problem, inputs, -(-problem.head_dim // 8) * 8
        q, scale, _ = with_positive_scale(x.q, x.softmax_scale)
        q, k, v = (padded(t, dim) for t in (q, x.k, x.v))
        with on(p.device):
            k, v = (without_trailing(t, x.cu_seqlens_k) for t in (k, v))
            q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
            cu_q, cu_k = x.cu_seqlens_q, x.cu_seqlens_k
            given = {
                "q": q, "k": k, "v": v, "softmax_scale": scale, "softcap": x.softcap, "out": target_of(out, q),
                "cu_seqlens_q": even_starts(p.batch, p.seqlen_q, q.device) if cu_q is None else cu_q,
                "cu_seqlens_k": even_starts(p.batch, p.seqlen_k, q.device) if cu_k is None else cu_k,
                "max_seqlen_q": p.seqlen_q, "max_seqlen_k": p.seqlen_k, "is_causal": p.right == 0,
                "window_size_left": p.left, "window_size_right": p.right,
            }  # fmt: skip
            result, statistics, *_ = PROBE.value(**arguments(PROBE.value._schema, given))
            store_out(out, result)
            store_statistics(lse, statistics)
            lse.masked_fill_(lse == float("-inf"), float("inf"))  # rows without keys

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """Never asked for: `reasons` refuses every backward problem."""
        raise NotImplementedError("FlashAttention-3 serves no gradients here")
