"""TransformerEngine: its detection block, taken from the installed file, and its calls of what the block imported.

The package itself does not import without CUDA, so the block runs alone, unchanged. The calls are transcribed from
version 2.20.2: FlashAttention.forward, and the steps of its context parallelism.
"""

import ast
import importlib.metadata
from types import SimpleNamespace
from typing import Callable  # noqa: UP035 - named by the file under test

import pytest
import torch
from packaging.version import Version
from programs import find, operator_calls

from flash_attn_plus.testing import Case, assert_close, make_inputs, run_reference

FOLDER = find("transformer_engine") / "pytorch" / "attention" / "dot_product_attention"
CASE = Case(2, 9, 9, 4, 2, 16, right=0)


def statement(file: str, is_wanted) -> ast.Module:
    """The one top-level statement of a file for which is_wanted(statement, its source) holds, as a program."""
    text = (FOLDER / file).read_text()
    found = [node for node in ast.parse(text).body if is_wanted(node, ast.get_source_segment(text, node))]
    assert len(found) == 1
    return ast.Module(found, type_ignores=[])


@pytest.fixture(scope="module")
def engine() -> SimpleNamespace:
    """The names that the detection block defines on this machine."""
    names = {
        "PkgVersion": Version,
        "get_pkg_version": importlib.metadata.version,
        "PackageNotFoundError": importlib.metadata.PackageNotFoundError,
        "Callable": Callable,
        "torch": torch,
        "get_device_compute_capability": lambda: torch.cuda.get_device_capability(),
    }
    utils = statement("utils.py", lambda node, _: getattr(node, "name", "") == "FlashAttentionUtils")
    exec(compile(utils, "utils.py", "exec"), names)
    names["fa_utils"] = names["FlashAttentionUtils"]
    block = statement("backends.py", lambda node, text: isinstance(node, ast.Try) and '("flash-attn")' in text)
    exec(compile(block, "backends.py", "exec"), names)
    return SimpleNamespace(**names)


def test_detection(engine):
    import flash_attn
    import flash_attn_2_cuda

    utils = engine.fa_utils
    assert utils.is_installed
    assert utils.v2_7_0_plus
    assert str(utils.version) == flash_attn.__version__
    assert engine.flash_attn_cuda_bwd is flash_attn_2_cuda.varlen_bwd
    assert engine.flash_attn_func is flash_attn.flash_attn_func
    assert engine._flash_attn_varlen_bwd is flash_attn.flash_attn_interface._flash_attn_varlen_backward


def hold(call, actual: dict[str, torch.Tensor]) -> None:
    dtype = call.inputs.q.dtype
    expected, eager = (run_reference(call, t, with_gradients=len(actual) > 1) for t in (torch.float64, dtype))
    for name, value in actual.items():
        assert_close(name, value, expected[name], eager[name])


@pytest.mark.parametrize("is_packed", [False, True])
def test_attention_module(engine, is_packed, device):
    """Dropout by position behind the lengths, everything else by name."""
    lengths = (5, 9, 2) if is_packed else None
    call = make_inputs(CASE._replace(lengths_q=lengths, lengths_k=lengths), torch.bfloat16, device)
    leaves = [x.detach().requires_grad_() for x in call.inputs[:3]]
    sequences = [call.inputs.cu_seqlens_q, call.inputs.cu_seqlens_k, 9, 9] if is_packed else []
    options = {"window_size": (-1, 0), "alibi_slopes": None, "deterministic": True, "softcap": 0.0}
    function = engine.flash_attn_varlen_func if is_packed else engine.flash_attn_func
    with operator_calls() as calls:
        out = function(*leaves, *sequences, 0.0, softmax_scale=16**-0.5, causal=True, **options)
        grads = torch.autograd.grad(out, leaves, call.dout)
    kind = " packed" if is_packed else ""
    assert calls == {"forward" + kind: 1, "backward" + kind: 1}
    hold(call, {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))})


def test_attention_module_with_paged_keys(engine, device):
    case = CASE._replace(batch=3, seqlen_k=24, lengths_q=(2, 1, 4), lengths_k=(9, 24, 17), page_size=8)
    call = make_inputs(case, torch.bfloat16, device)
    x = call.inputs
    with operator_calls() as calls:
        out = engine.flash_attn_varlen_func(
            x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, 4, 24, 0.0, softmax_scale=0.25, causal=True,
            window_size=(-1, 0), alibi_slopes=None, deterministic=False, softcap=0.0, block_table=x.block_table,
        )  # fmt: skip
    assert calls == {"forward packed": 1}
    hold(call, {"out": out})


@pytest.mark.parametrize("is_packed", [False, True])
def test_context_parallel_step(engine, is_packed, device):
    """The private pair: results by index, gradients into the caller's tensors."""
    lengths = (5, 9, 2) if is_packed else None
    call = make_inputs(CASE._replace(lengths_q=lengths, lengths_k=lengths), torch.bfloat16, device)
    x = call.inputs
    sequences = [x.cu_seqlens_q, x.cu_seqlens_k, 9, 9] if is_packed else []
    options = {"softmax_scale": 0.25, "dropout_p": 0.0, "alibi_slopes": None, "softcap": 0.0}
    options |= {"window_size_left": -1, "window_size_right": 0}
    forward, backward = engine._flash_attn_fwd, engine._flash_attn_bwd
    only_packed = {}
    if is_packed:
        forward, backward = engine._flash_attn_varlen_fwd, engine._flash_attn_varlen_bwd
        only_packed["block_table"] = None
    with operator_calls() as calls:
        results = forward(x.q, x.k, x.v, *sequences, causal=True, return_softmax=False, **options, **only_packed)
        out, lse, rng_state = results[0], results[1], results[3]
        grads = {f"d{name}": torch.empty_like(getattr(x, name)) for name in "qkv"}
        backward(
            call.dout, x.q, x.k, x.v, out, lse, *grads.values(), *sequences, causal=True, rng_state=rng_state,
            deterministic=True, **options,
        )  # fmt: skip
    kind = " packed" if is_packed else ""
    assert calls == {"forward" + kind: 1, "backward" + kind: 1}
    hold(call, {"out": out, "lse": lse, **grads})
