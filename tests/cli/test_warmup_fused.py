"""`warmup` compiles the fused operations and masks of blocks that a model names, as its calls will look them up."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from flash_attn_plus import InvalidArgument, device, ops, selection
from flash_attn_plus.backends.triton_portable import is_interpreted
from flash_attn_plus.block_sparse import block_sparse_attention
from flash_attn_plus.cli import ahead, fused_samples, warmup, words
from flash_attn_plus.fused import cross_entropy as cross_entropies
from flash_attn_plus.fused import norm as norms
from flash_attn_plus.fused import rotary
from flash_attn_plus.fused.norm_autograd import NormFunction

pytestmark = pytest.mark.skipif(is_interpreted(), reason="kernels are interpreted")
CPU = torch.device("cpu")


def plan(target, text):
    found = words.read(text, words.MODEL_WORDS)
    return ahead.plan(target, fused_samples.samples(found, found.get("dtype", torch.bfloat16)))


def leaf(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).requires_grad_()


def norm(cols, is_rms_norm, has_residual):
    x, weight, bias = leaf(3, 5, cols), leaf(cols), None if is_rms_norm else leaf(cols)
    residual = leaf(3, 5, cols) if has_residual else None
    options = (None, None, None, 1e-6, 0.0, None, has_residual, False, False, is_rms_norm)
    result = NormFunction.apply(x, weight, bias, residual, *options)
    sum(y.float().sum() for y in (result if has_residual else (result,))).backward()


def cross_entropy(classes):
    losses, _ = cross_entropies.cross_entropy(leaf(7, classes), torch.zeros(7, dtype=torch.int64))
    losses.sum().backward()


def rotate(heads, dim):
    x, table = torch.zeros(1, 9, heads, dim, dtype=torch.bfloat16), torch.zeros(64, dim // 2, dtype=torch.bfloat16)
    rotary.apply_rotary(x, table, table, 3)
    rotary.apply_rotary(x, table, table, 3, conjugate=True)


CALLS = {
    "rmsnorm=4096": lambda: [norm(4096, True, r) for r in (False, True)],
    "layernorm=1000": lambda: [norm(1000, False, r) for r in (False, True)],
    "layernorm=16384": lambda: [norm(16384, False, r) for r in (False, True)],
    "vocab=50257": lambda: cross_entropy(50257),
    "rotary h=8 hk=2 d=64": lambda: [rotate(h, 64) for h in (8, 2)],
}


@pytest.mark.parametrize("text", CALLS)
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_what_is_compiled_is_what_calls_look_up(target, text):
    where = ahead.known_target(target)
    planned = {(job.kernel, job.key) for job in plan(where, f"{text} train")}
    found = set()
    with ExitStack() as stack:
        for module in (norms, cross_entropies, rotary):
            stack.enter_context(mock.patch.object(module, "uses_triton", return_value=True))
        stack.enter_context(ahead.only_compiling(where, lambda *kernel: bool(found.add(kernel))))
        stack.enter_context(ahead.as_if_present(where))
        stack.enter_context(device.assumed(CPU, where.facts))
        CALLS[text]()
    assert found
    # few rows are added up in smaller steps, which are not compiled ahead
    assert {kernel for kernel in found - planned if kernel[0] != "norm_totals_kernel"} == set()


def test_only_what_is_named_and_without_train_forward_only():
    where = ahead.known_target("cuda:90")
    assert plan(where, "d=64") == []
    assert {job.kernel for job in plan(where, "rmsnorm=1024 vocab=1000")} == {
        "norm_forward_kernel", "cross_entropy_fwd_kernel",
    }  # fmt: skip
    (job,) = plan(where, "rotary d=64 h=4")
    assert job.sample.place() == ("rotary", "4 64")


def test_they_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    jobs = plan(ahead.known_target("cuda:90"), "layernorm=16384 train")
    done = ahead.compile_all(jobs, 1, lambda _: None)
    assert [d.error for d in done] == [None] * len(jobs)
    assert len(list(tmp_path.rglob("*.cubin"))) == len(jobs)


@pytest.mark.parametrize("lead", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
def test_masks_of_blocks(lead):
    where = ahead.known_target("cuda:90")
    found_words = words.read("b=2 s=300 h=4 hk=2 d=64 causal blocks=64,128 train", words.MODEL_WORDS)
    planned = {(job.kernel, job.key) for job in ahead.plan(where, warmup.samples(where, found_words))}
    q, k, v = (leaf(2, 300, heads, 64) for heads in (4, 2, 2))
    found = set()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ops, "choose", return_value=selection.get("triton")))
        stack.enter_context(ahead.only_compiling(where, lambda *kernel: bool(found.add(kernel))))
        stack.enter_context(device.assumed(CPU, where.facts))
        ahead.forget_launches()
        mask = torch.ones(*lead, 5, 3, dtype=torch.bool)
        block_sparse_attention(q, k, v, mask, block_size=(64, 128), causal=True).float().sum().backward()
    assert {kernel for kernel, _ in found} >= {"attention_lists_kernel", "attention_backward_dkdv_kernel"}
    assert found <= planned


def test_blocks_have_two_sizes():
    with pytest.raises(InvalidArgument, match="blocks=128,128"):
        words.read("blocks=64", words.MODEL_WORDS)
