"""Older modules: attention with an additive bias, softmax of scores."""

import pytest
import torch
from flash_attn import flash_attn_triton, flash_attn_triton_og
from flash_attn.fused_softmax import (
    FusedScaleMaskSoftmax,
    scaled_masked_softmax,
    scaled_upper_triang_masked_softmax,
)
from formulas import normal


def plain_attention(q, k, v, bias, causal, scale):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores if bias is None else scores + bias
    if causal:
        rows, cols = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        scores = scores.masked_fill((cols > rows).to(q.device), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, 9), (2, 3, 6, 9)], ids=str)
def test_additive_bias_and_top_left_causal(device, causal, bias_shape):
    q = normal(2, 6, 3, 16, dtype=torch.float64, device=device)
    kv = normal(2, 9, 2, 3, 16, dtype=torch.float64, device=device)
    bias = None if bias_shape is None else normal(*bias_shape, dtype=torch.float64, device=device).requires_grad_()
    expected = plain_attention(q, kv[:, :, 0], kv[:, :, 1], bias, causal, 0.3)
    actual = flash_attn_triton.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], bias, causal, 0.3)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(flash_attn_triton.flash_attn_kvpacked_func(q, kv, bias, causal, 0.3), expected)
    assert not actual.requires_grad


def test_packed_and_tutorial_forms(device):
    qkv = normal(2, 6, 3, 3, 16, dtype=torch.float64, device=device)
    q, k, v = qkv.unbind(2)
    expected = plain_attention(q, k, v, None, True, 0.25)
    torch.testing.assert_close(flash_attn_triton.flash_attn_qkvpacked_func(qkv, None, True), expected)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(flash_attn_triton_og.attention(*heads_first, 0.25), expected.transpose(1, 2))


def test_softmax_of_scores(device):
    scores = normal(2, 3, 5, 5, dtype=torch.bfloat16, device=device)
    causal = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    expected = (scores.float() * 0.5).masked_fill(causal, float("-inf")).softmax(-1).bfloat16()
    assert torch.equal(scaled_upper_triang_masked_softmax(scores.flatten(0, 1), None, 0.5).view_as(scores), expected)
    module = FusedScaleMaskSoftmax(False, True, "causal", True, None, True, 0.5)
    assert torch.equal(module(scores, None), expected)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.bool, device=device)
    mask[:, :, :, 3:] = True
    expected = (scores.float() * 0.5).masked_fill(mask, -10000.0).softmax(-1).bfloat16()
    assert torch.equal(scaled_masked_softmax(scores, mask, 0.5), expected)
    module = FusedScaleMaskSoftmax(False, True, "padding", True, None, True, 0.5)
    assert torch.equal(module(scores, mask), expected)
    assert torch.equal(module(scores, None), (scores.float() * 0.5).softmax(-1).bfloat16())
    with pytest.raises(RuntimeError, match="exclude"):
        FusedScaleMaskSoftmax(True, True, "causal", True, None, True, None)
