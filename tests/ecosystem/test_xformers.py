"""xFormers' flash operator, which calls the raw extension by position, for the attention biases it accepts.

On a CPU its two operators get their own functions as kernels, since it registers them for CUDA alone; it takes
float16 there, but not bfloat16.
"""

import pytest
import torch
from programs import operator_calls, require

from flash_attn_plus.testing import assert_close

xops = require("xformers.ops")
fmha = require("xformers.ops.fmha")
flash = fmha.flash
bias = fmha.attn_bias
OPERATORS = (flash.FwOp, flash.BwOp)


@pytest.fixture(autouse=True, scope="module")
def _admit_cpu():
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            for function in (flash._flash_fwd, flash._flash_bwd):
                function.register_kernel("cpu")(function._init_fn)
            for operator in OPERATORS:
                patch.setattr(operator, "SUPPORTED_DEVICES", {"cpu"})
        yield


@pytest.fixture
def device(device: str) -> torch.device:
    """What xFormers compares with, too."""
    return torch.device(device)


def normal(*shape: int, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.float16)


def plain(q, k, v, attn_bias, dtype) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v of (b, s, h, d) in a dtype."""
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if attn_bias is not None:
        scores = scores + attn_bias.materialize(scores.shape, device=q.device).to(dtype)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def gradients(out, leaves, dout) -> list[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


LENGTHS = (5, 9, 2)
# name: (batch, queries, keys, bias made on a device)
DENSE = {
    "none": (2, 9, 9, lambda device: None),
    "causal": (2, 9, 9, lambda device: bias.LowerTriangularMask()),
    "causal-bottom-right": (2, 5, 9, lambda device: bias.LowerTriangularFromBottomRightMask()),
    "local": (2, 9, 9, lambda device: bias.LocalAttentionFromBottomRightMask(3, 2)),
    "causal-local": (2, 9, 9, lambda device: bias.LowerTriangularFromBottomRightLocalAttentionMask(4)),
}


def block_diagonal(device):
    return bias.BlockDiagonalMask.from_seqlens(LENGTHS, (7, 3, 6), device=device)


def block_diagonal_causal(device):
    return bias.BlockDiagonalCausalMask.from_seqlens(LENGTHS, device=device)


PACKED = {
    "block-diagonal": (1, 16, 16, block_diagonal),
    "block-diagonal-causal": (1, 16, 16, block_diagonal_causal),
    "block-diagonal-bottom-right": (1, 16, 26, lambda device: bias.BlockDiagonalMask.from_seqlens(
        LENGTHS, (8, 12, 6), device=device).make_causal_from_bottomright()),
    "block-diagonal-local": (1, 16, 16, lambda device: block_diagonal_causal(device).make_local_attention(3)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DENSE, *PACKED])
def test_output_lse_and_gradients(name, device):
    batch, queries, keys, make = (DENSE | PACKED)[name]
    attn_bias = make(device)
    q = normal(batch, queries, 4, 16, device=device, seed=1).requires_grad_()
    k, v = (normal(batch, keys, 4, 16, device=device, seed=seed).requires_grad_() for seed in (2, 3))
    dout = normal(batch, queries, 4, 16, device=device, seed=4)
    with operator_calls() as calls:
        out = xops.memory_efficient_attention(q, k, v, attn_bias, op=OPERATORS)
        actual = gradients(out, (q, k, v), dout)
    kind = " packed" if name in PACKED else ""
    assert calls == {"forward" + kind: 1, "backward" + kind: 1}
    with operator_calls() as calls:
        expected = gradients(plain(q, k, v, attn_bias, torch.float64), (q, k, v), dout)
        eager = gradients(plain(q, k, v, attn_bias, torch.float16), (q, k, v), dout)
    assert not calls
    exact = [x.double().requires_grad_() for x in (q, k, v)]  # gradients that are not rounded to float16
    expected[1:] = gradients(plain(*exact, attn_bias, torch.float64), exact, dout)[1:]
    for label, *values in zip(("out", "dq", "dk", "dv"), actual, expected, eager, strict=True):
        assert_close(label, *values)
    _, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias, op=flash.FwOp)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
    if attn_bias is not None:
        scores = scores + attn_bias.materialize(scores.shape, device=device).double()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_gradients_of_one_packed_tensor_share_its_memory(device):
    """The three gradients are slices of one tensor that is filled in place."""
    qkv = normal(2, 9, 3, 4, 16, device=device, seed=1).requires_grad_()
    dout = normal(2, 9, 4, 16, device=device, seed=2)
    out = xops.memory_efficient_attention(*qkv.unbind(2), bias.LowerTriangularMask(), op=OPERATORS)
    (actual,) = torch.autograd.grad(out, qkv, dout)
    leaves = [x.detach().clone().requires_grad_() for x in qkv.unbind(2)]
    apart = torch.autograd.grad(
        xops.memory_efficient_attention(*leaves, bias.LowerTriangularMask(), op=OPERATORS), leaves, dout
    )
    assert torch.equal(actual, torch.stack(apart, 2))


@pytest.mark.parametrize("form", ["padded", "padded-causal", "gappy", "paged"])
def test_keys_in_a_cache(form, device):
    """Keys of sequences in slots of 8, of which some are used: forward only, as in decoding."""
    queries, used, slot = (2, 1, 3), (6, 8, 3), 8
    q = normal(1, sum(queries), 4, 16, device=device, seed=1)
    k, v = (normal(1, slot * len(used), 4, 16, device=device, seed=seed) for seed in (2, 3))
    pages = None
    if form == "gappy":
        made = bias.BlockDiagonalGappyKeysMask.from_seqlens(queries, [0, 8, 16, 24], used, device=device)
    elif form == "padded":
        made = bias.BlockDiagonalPaddedKeysMask.from_seqlens(queries, slot, used, device=device)
    else:
        made = bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(queries, slot, used, device=device)
    expected, eager = (plain(q, k, v, made, dtype) for dtype in (torch.float64, torch.float16))
    if form == "paged":
        pages = torch.tensor([[4, 1], [0, 5], [3, 2]], dtype=torch.int32, device=device)
        k, v = (torch.empty_like(x).unflatten(1, (-1, 4)).index_copy_(
            1, pages.flatten().long(), x.unflatten(1, (-1, 4))).flatten(1, 2) for x in (k, v))  # fmt: skip
        made = made.make_paged(pages, page_size=4, paged_type=bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask)
    with operator_calls() as calls:
        out = xops.memory_efficient_attention_forward(q, k, v, made, op=flash.FwOp)
    assert calls == {"forward packed": 1}
    assert_close("out", out, expected, eager)


def test_heads_in_groups(device):
    """Five dimensions (b, s, groups, heads, d) whose keys are expanded over the heads."""
    q = normal(2, 9, 2, 3, 16, device=device, seed=1)
    k, v = (normal(2, 9, 2, 1, 16, device=device, seed=seed).expand(2, 9, 2, 3, 16) for seed in (2, 3))
    out = xops.memory_efficient_attention_forward(q, k, v, bias.LowerTriangularMask(), op=flash.FwOp)
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    expected, eager = (plain(*flat, bias.LowerTriangularMask(), dtype) for dtype in (torch.float64, torch.float16))
    assert_close("out", out.flatten(2, 3), expected, eager)


def test_it_found_our_package():
    import flash_attn

    assert flash_attn.__version__ == flash.FLASH_VERSION
    assert flash._flash_attn_cuda is flash_attn.flash_attn_interface.flash_attn_gpu
