"""The block-sparse interface: a mask of 16 x 256 blocks over packed sequences, and the modules over it."""

import inspect
import types

import pytest
import torch
from flash_attn import flash_blocksparse_attn_interface as interface
from flash_attn.flash_blocksparse_attention import FlashBlocksparseAttention, FlashBlocksparseMHA

from flash_attn_plus import InvalidArgument
from flash_attn_plus.reference import shown_by_blocks

LENGTHS = (300, 33, 0, 520)
HEADS, DIM = 2, 16


class Layout:
    """A layout of random blocks, one of each row visible at least."""

    def __init__(self, density=0.5):
        self.density = density

    def make_layout(self, length):
        random = torch.Generator().manual_seed(length)
        layout = torch.rand(length // 16, length // 256, generator=random) < self.density
        layout[torch.arange(length // 16), torch.arange(length // 16) // 16] = True
        return layout.int()


def packed(device):
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), 3, HEADS, DIM, generator=random, dtype=torch.float64).to(device)
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return qkv.requires_grad_(), starts


def plain(qkv, starts, blocks, causal=False, scale=DIM**-0.5):
    """(out, weights of each sequence) written out."""
    outs, weights = [], []
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (x.transpose(0, 1) for x in qkv[first:last].unbind(1))
        shown = shown_by_blocks(blocks.bool(), (16, 256), last - first, last - first)
        shown = shown.tril() if causal else shown
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~shown, float("-inf"))
        weights.append(scores.softmax(-1).nan_to_num(0.0))
        outs.append((weights[-1] @ v).transpose(0, 1))
    return torch.cat(outs), weights


@pytest.fixture
def blocks(device):
    return Layout().make_layout(768).to(device)


@pytest.mark.parametrize("convert_mask", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_function(device, blocks, causal, convert_mask):
    qkv, starts = packed(device)
    given = blocks if convert_mask else interface.convert_blockmask(blocks, causal=False)
    out = interface.flash_blocksparse_attn_func(
        qkv, starts, given, 0.0, max(LENGTHS), softmax_scale=0.3, causal=causal, convert_mask=convert_mask
    )
    expected, _ = plain(qkv, starts, blocks, causal, 0.3)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    (grad,), (wanted,) = (torch.autograd.grad(x, qkv, dout) for x in (out, expected))
    assert grad.is_contiguous()
    torch.testing.assert_close(grad, wanted)


def test_weights_and_lse(device, blocks):
    qkv, starts = packed(device)
    out, weights, lse = interface.flash_blocksparse_attn_func(qkv, starts, blocks, 0.0, 520, return_attn_probs=True)
    expected, expected_weights = plain(qkv, starts, blocks)
    torch.testing.assert_close(out, expected)
    assert not weights.requires_grad
    for n, length in enumerate(LENGTHS):
        torch.testing.assert_close(weights[n, :, :length, :length], expected_weights[n])
        assert (weights[n, :, length:] == 0).all()
        assert (weights[n, :, :, length:] == 0).all()
        assert (lse[n, :, length:] == float("inf")).all()
        assert lse[n, :, :length].isfinite().all()
    assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()


def test_dropout_is_told_by_signs(device, blocks):
    qkv, starts = packed(device)
    torch.manual_seed(0)
    out, weights, _ = interface.flash_blocksparse_attn_func(qkv, starts, blocks, 0.25, 520, return_attn_probs=True)
    _, plain_weights = plain(qkv, starts, blocks)
    for n, (first, length) in enumerate(zip(starts.tolist(), LENGTHS, strict=False)):
        signed = weights[n, :, :length, :length]
        torch.testing.assert_close(signed.abs(), plain_weights[n])
        v = qkv[first : first + length, 2].transpose(0, 1)
        expected = (signed.clamp_min(0.0) / 0.75) @ v
        torch.testing.assert_close(out[first : first + length], expected.transpose(0, 1))
    assert abs((weights[weights != 0] < 0).double().mean().item() - 0.25) < 0.01


def test_mask_conversion():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]])
    expected = [[0 + 1, 8 + 1, -1], [4 + 3, 8, -1], [0 + 2, 8 + 2, -1]]
    converted = interface.convert_blockmask(mask, causal=False)
    assert converted.dtype == torch.int32
    assert converted.tolist() == expected
    with pytest.raises(AssertionError, match="causal"):
        interface.convert_blockmask(mask, causal=True)


@pytest.mark.parametrize("convert_mask", [True, False])
def test_module(device, convert_mask):
    module = FlashBlocksparseAttention(Layout(), softmax_temp=0.3, max_seq_length=700, device=device).eval()
    assert list(module.state_dict()) == ["layout", "blockmask_converted"]
    qkv = torch.randn(2, 290, 3, HEADS, DIM, dtype=torch.float64, device=device)
    starts = torch.tensor([0, 290, 580], dtype=torch.int32, device=device)
    out, weights = module(qkv, causal=True, convert_mask=convert_mask)
    expected, _ = plain(qkv.flatten(0, 1), starts, module.layout, True, 0.3)
    torch.testing.assert_close(out.flatten(0, 1), expected)
    assert weights is None
    ragged, _ = module(qkv.flatten(0, 1), causal=True, cu_seqlens=starts, max_s=290, convert_mask=convert_mask)
    assert torch.equal(ragged, out.flatten(0, 1))


@pytest.mark.parametrize("wrap", [lambda mask: mask, lambda mask: types.SimpleNamespace(bool_matrix=mask)])
def test_module_with_padding(device, wrap):
    module = FlashBlocksparseAttention({"_target_": f"{__name__}.Layout", "density": 0.3}, device=device)
    assert module.sparsity_config.density == 0.3
    qkv = torch.randn(2, 290, 3, HEADS, DIM, dtype=torch.float64, device=device)
    is_token = torch.arange(290, device=device) < torch.tensor([[290], [270]], device=device)
    out, _ = module(qkv, key_padding_mask=wrap(is_token))
    for n, length in enumerate((290, 270)):
        starts = torch.tensor([0, length], dtype=torch.int32, device=device)
        torch.testing.assert_close(out[n, :length], plain(qkv[n, :length], starts, module.layout)[0])
        assert (out[n, length:] == 0).all()


def test_module_drops_weights_while_training_only(device):
    module = FlashBlocksparseAttention(Layout(), attention_dropout=0.5, max_seq_length=256, device=device)
    qkv = torch.randn(1, 64, 3, HEADS, DIM, device=device)
    first, second = module(qkv)[0], module(qkv)[0]
    assert not torch.equal(first, second)
    module.eval()
    first, second = module(qkv)[0], module(qkv)[0]
    assert torch.equal(first, second)


def test_multi_head_module(device):
    module = FlashBlocksparseMHA(
        32, HEADS, Layout(), causal=True, max_seq_length=512, device=device, dtype=torch.float64
    )
    x = torch.randn(2, 270, 32, dtype=torch.float64, device=device, requires_grad=True)
    out, weights = module(x, x, x)
    qkv = module.Wqkv(x).view(540, 3, HEADS, 16)
    starts = torch.tensor([0, 270, 540], dtype=torch.int32, device=device)
    expected = module.out_proj(plain(qkv, starts, module.inner_attn.layout, True)[0].reshape(2, 270, 32))
    torch.testing.assert_close(out, expected)
    assert weights is None
    grads = [
        torch.autograd.grad(y.square().sum(), (x, *module.parameters()), retain_graph=True) for y in (out, expected)
    ]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_signatures():
    """Names, order and defaults of the original."""
    rendered = {
        "flash_blocksparse_attn_func": interface.flash_blocksparse_attn_func,
        "FlashBlocksparseAttention": FlashBlocksparseAttention,
        "FlashBlocksparseMHA": FlashBlocksparseMHA,
    }
    assert {name: str(inspect.signature(x)) for name, x in rendered.items()} == {
        "flash_blocksparse_attn_func": "(qkv, cu_seqlens, blockmask, dropout_p, max_s, softmax_scale=None,"
        " causal=False, return_attn_probs=False, convert_mask=True)",
        "FlashBlocksparseAttention": "(sparsity_config, softmax_temp=None, attention_dropout=0.0, max_seq_length=2048,"
        " device=None, dtype=None)",
        "FlashBlocksparseMHA": "(embed_dim, num_heads, sparsity_config, bias=True, batch_first=True,"
        " attention_dropout=0.0, causal=False, max_seq_length=2048, device=None, dtype=None, **kwargs)",
    }


QKV, STARTS, MASK = torch.zeros(40, 3, 2, 8), torch.tensor([0, 40], dtype=torch.int32), torch.ones(3, 1)
MODULE = FlashBlocksparseAttention(Layout(), max_seq_length=256)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: interface.flash_blocksparse_attn_func(QKV, STARTS, MASK[:2], 0.0, 40),
            "at least 3 rows and 1 columns",
        ),
        (lambda: interface.flash_blocksparse_attn_func(QKV, STARTS, MASK[None], 0.0, 40), "rows, columns"),
        (lambda: interface.flash_blocksparse_attn_func(QKV[:, :2], STARTS, MASK, 0.0, 40), "total, 3, heads"),
        (lambda: MODULE(QKV[None], attn_mask=MASK), "attn_mask"),
        (lambda: MODULE(QKV[None], need_weights=True), "need_weights"),
        (lambda: MODULE(QKV, cu_seqlens=STARTS), "max_s"),
        (lambda: FlashBlocksparseAttention(None), "make_layout"),
        (lambda: FlashBlocksparseAttention({"density": 1}), "_target_"),
        (
            lambda: FlashBlocksparseAttention({"_target_": "x.Y", "inner": {"_target_": "x.Z"}}),
            "hydra.utils.instantiate",
        ),
        (lambda: FlashBlocksparseAttention(types.SimpleNamespace(make_layout=lambda n: MASK)), "blocks of 16 x 256"),
        (lambda: FlashBlocksparseMHA(32, 2, Layout(), batch_first=False), "batch_first"),
        (lambda: FlashBlocksparseMHA(32, 2, Layout(), dropout=0.1), "no argument dropout"),
        (lambda: FlashBlocksparseMHA(33, 2, Layout()), "multiple of num_heads"),
        (lambda: FlashBlocksparseMHA(32, 2, Layout())(torch.zeros(1, 9, 32), torch.ones(1, 9, 32), None), "x_ignored_"),
    ],
)
def test_bad_calls_are_told(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()
