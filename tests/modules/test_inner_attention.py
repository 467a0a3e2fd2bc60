"""Attention modules without parameters: the engine's against the formula in PyTorch, in float64."""

import math

import pytest
import torch
from flash_attn.modules.mha import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)

LENGTHS = torch.tensor([9, 4, 1])
MASK = torch.arange(9) < LENGTHS[:, None]
CU_SEQLENS = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0)).int()


def make(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_equal_with_gradients(actual, expected, leaves, select=lambda x: x):
    """Outputs, and gradients of a random weighting of them."""
    torch.testing.assert_close(select(actual), select(expected))
    weight = torch.randn_like(select(expected))
    grads = [torch.autograd.grad((select(x) * weight).sum(), leaves) for x in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_self_attention(causal, softmax_scale):
    qkv = make(3, 9, 3, 4, 8)
    flash, plain = (cls(causal, softmax_scale) for cls in (FlashSelfAttention, SelfAttention))
    assert_equal_with_gradients(flash(qkv), plain(qkv), (qkv,))
    assert torch.equal(plain(qkv, causal=not causal), SelfAttention(not causal, softmax_scale)(qkv))
    assert torch.equal(flash(qkv, causal=not causal), FlashSelfAttention(not causal, softmax_scale)(qkv))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_k", [4, 2, 1])
@pytest.mark.parametrize("seqlen_k", [9, 14])
def test_cross_attention(causal, heads_k, seqlen_k):
    q, kv = make(3, 9, 4, 8), make(3, seqlen_k, 2, heads_k, 8)
    flash, plain = FlashCrossAttention(causal), CrossAttention(causal)
    assert_equal_with_gradients(flash(q, kv), plain(q, kv), (q, kv))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_those_without_padding(causal):
    qkv = make(3, 9, 3, 4, 8)
    packed = FlashSelfAttention(causal)(qkv[MASK], cu_seqlens=CU_SEQLENS, max_seqlen=9)
    padded = SelfAttention(causal)(qkv, key_padding_mask=MASK)
    assert_equal_with_gradients(packed, padded[MASK], (qkv,))


def test_packed_cross_attention():
    q, kv, lengths_q = make(3, 9, 4, 8), make(3, 9, 2, 2, 8), torch.tensor([2, 9, 5])
    mask_q = torch.arange(9) < lengths_q[:, None]
    cu_seqlens_q = torch.nn.functional.pad(lengths_q.cumsum(0), (1, 0)).int()
    packed = FlashCrossAttention()(q[mask_q], kv[MASK], False, cu_seqlens_q, 9, CU_SEQLENS, 9)
    padded = CrossAttention()(q, kv, key_padding_mask=MASK)
    assert_equal_with_gradients(packed, padded[mask_q], (q, kv))


def test_causal_diagonal_ends_at_the_last_key_kept():
    q, kv = make(3, 4, 4, 8), make(3, 9, 2, 2, 8)
    lengths = torch.tensor([9, 4, 6])
    mask = torch.arange(9) < lengths[:, None]
    cu_seqlens, cu_seqlens_k = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in (lengths * 0 + 4, lengths))
    packed = FlashCrossAttention(True)(q.flatten(0, 1), kv[mask], None, cu_seqlens, 4, cu_seqlens_k, 9)
    padded = CrossAttention(True)(q, kv, key_padding_mask=mask)
    assert_equal_with_gradients(packed, padded.flatten(0, 1), (q, kv))


@pytest.mark.parametrize("cls", [FlashSelfAttention, FlashCrossAttention])
def test_options_of_the_engine_reach_it(cls):
    q, kv = make(1, 9, 4, 8), make(1, 9, 2, 4, 8)
    slopes = torch.tensor(get_alibi_slopes(4))
    module = cls(window_size=(3, 1), alibi_slopes=slopes, deterministic=True)
    inputs = (torch.cat((q[:, :, None], kv), 2),) if cls is FlashSelfAttention else (q, kv)
    distance = torch.arange(9)[None, :] - torch.arange(9)[:, None]
    bias = -slopes[:, None, None].double() * distance.abs()
    bias = bias.masked_fill((distance < -3) | (distance > 1), -math.inf)
    scores = torch.einsum("bthd,bshd->bhts", q, kv[:, :, 0]) * 8**-0.5 + bias
    expected = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), kv[:, :, 1])
    assert_equal_with_gradients(module(*inputs), expected, (q, kv))
    assert "alibi_slopes" in dict(module.named_buffers())
    assert not module.state_dict()
    assert module.bfloat16()._options(None)["alibi_slopes"].dtype == torch.float32


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (SelfAttention(attention_dropout=0.5), [(1, 64, 3, 4, 8)]),
        (CrossAttention(attention_dropout=0.5), [(1, 64, 4, 8), (1, 64, 2, 4, 8)]),
        (FlashSelfAttention(attention_dropout=0.5), [(1, 64, 3, 4, 8)]),
        (FlashCrossAttention(attention_dropout=0.5), [(1, 64, 4, 8), (1, 64, 2, 4, 8)]),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, torch.nn.Module) else "",
)
def test_dropout_in_training_only(module, shapes):
    inputs = [torch.randn(*shape) for shape in shapes]
    with torch.no_grad():
        inputs[-1][:, :, -1] = 1.0  # then every output is the sum of the weights kept
        kept = module.train()(*inputs)
        assert not torch.equal(kept, module(*inputs))
        assert kept.mean().item() == pytest.approx(1.0, abs=0.1)
        assert kept.std() > 0.05
        torch.testing.assert_close(module.eval()(*inputs), torch.ones_like(kept))


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (8, [2**-i for i in range(1, 9)]),
    ],
)
def test_alibi_slopes(heads, slopes):
    assert get_alibi_slopes(heads) == slopes


def test_lengths_are_checked():
    qkv = torch.randn(5, 3, 2, 8)
    for cu_seqlens, max_seqlen, message in (
        (torch.tensor([0, 5]), 5, "int32"),
        (torch.tensor([0, 5]).int(), torch.tensor(5), "int, not Tensor"),
        (torch.tensor([0, 5]).int(), None, "max_seqlen"),
    ):
        with pytest.raises(AssertionError, match=message):
            FlashSelfAttention()(qkv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    with pytest.raises(AssertionError, match="cu_seqlens_k"):
        FlashCrossAttention()(qkv[:, 0], qkv[:, 1:], cu_seqlens=torch.tensor([0, 5]).int(), max_seqlen=5)
