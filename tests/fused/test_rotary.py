"""Rotary embedding of one tensor, of packed tensors, and the module."""

from functools import partial

import formulas
import pytest
import torch
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from flash_attn.ops.triton.rotary import apply_rotary
from formulas import assert_follows, normal

from flash_attn_plus.testing import assert_close

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LENGTH, BATCH, HEADS = 7, 2, 3


def tables(rows, half, device, dtype=torch.float32):
    angles = normal(rows, half, dtype=torch.float64, device=device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def offsets_of(kind, device):
    return {"none": 0, "int": 3, "tensor": torch.tensor([4, 1], device=device, dtype=torch.int32)}[kind]


def positions_of(offsets, length, rows, device):
    """(b, s) table rows, -1 beyond the tables."""
    first = offsets[:, None] if isinstance(offsets, torch.Tensor) else torch.full((BATCH, 1), offsets, device=device)
    positions = first.long() + torch.arange(length, device=device)
    return positions.where(positions < rows, -1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (40, 20), (64, 48)])
@pytest.mark.parametrize("kind", ["none", "int", "tensor"])
def test_one_tensor(path, device, dtype, interleaved, inplace, head_dim, rotary_dim, kind):
    rows = 10
    cos, sin = tables(rows, rotary_dim // 2, device, dtype)
    offsets = offsets_of(kind, device)
    positions = positions_of(offsets, LENGTH, rows, device)

    def actual(x):
        x = x * 1 if inplace else x
        before = x.detach().clone()
        out = apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets)
        assert (out.data_ptr() == x.data_ptr()) == inplace
        assert inplace or torch.equal(x, before)
        return out

    def formula(x):
        return formulas.rotary(x, cos.to(x.dtype), sin.to(x.dtype), positions=positions, interleaved=interleaved)

    tensors = {"x": normal(BATCH, LENGTH, HEADS, head_dim, dtype=dtype, device=device)}
    (out,) = assert_follows(actual, formula, tensors)
    assert torch.equal(out[..., rotary_dim:], tensors["x"][..., rotary_dim:])


@pytest.mark.parametrize("heads", [1, 7, 20])
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_that_fill_no_block(path, device, heads, interleaved):
    """In place, beside heads that must stay as they are."""
    cos, sin = tables(LENGTH, 32, device)
    wide = normal(BATCH, LENGTH, heads + 2, 64, dtype=torch.float32, device=device)
    before = wide.clone()
    apply_rotary(wide[:, :, 1:-1], cos, sin, interleaved=interleaved, inplace=True)
    positions = torch.arange(LENGTH, device=device).expand(BATCH, LENGTH)
    expected = formulas.rotary(
        before.double(), cos.double(), sin.double(), positions=positions, interleaved=interleaved
    )
    eager = formulas.rotary(before, cos, sin, positions=positions, interleaved=interleaved)
    assert_close("out", wide[:, :, 1:-1], expected[:, :, 1:-1], eager[:, :, 1:-1])
    assert torch.equal(wide[:, :, [0, -1]], before[:, :, [0, -1]])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_packed_sequences(path, device, interleaved, has_offsets):
    lengths = (5, 0, 7, 1)
    cu_seqlens = torch.tensor([0, 5, 5, 12, 13], dtype=torch.int32, device=device)
    cos, sin = tables(12, 16, device)
    starts = torch.tensor([0, 2, 8, 3], device=device) if has_offsets else torch.zeros(4, dtype=torch.int64)
    positions = torch.cat([int(s) + torch.arange(n) for s, n in zip(starts, lengths, strict=True)]).to(device)
    positions = torch.cat((positions, positions.new_full((3,), -1)))  # rows behind the last sequence stay as they are
    positions = positions.where(positions < 12, -1)
    actual = partial(
        apply_rotary_emb, cos=cos, sin=sin, interleaved=interleaved, cu_seqlens=cu_seqlens, max_seqlen=7,
        seqlen_offsets=starts.to(device) if has_offsets else 0,
    )  # fmt: skip

    def formula(x):
        return formulas.rotary(x, cos.to(x.dtype), sin.to(x.dtype), positions=positions, interleaved=interleaved)

    assert_follows(actual, formula, {"x": normal(16, HEADS, 40, dtype=torch.float32, device=device)})


def test_strided_inputs(path, device):
    cos, sin = tables(LENGTH, 8, device)
    by_column = cos.t().contiguous().t()
    views = {
        "heads first": lambda x: apply_rotary_emb(x.transpose(1, 2), cos, sin),
        "last stride 2": lambda x: apply_rotary_emb(torch.stack((x, x), -1)[..., 0].transpose(1, 2), cos, sin),
        "strided table": lambda x: apply_rotary_emb(x.transpose(1, 2), by_column, sin),
    }

    def formula(x):
        positions = torch.arange(LENGTH, device=x.device)
        return formulas.rotary(x.transpose(1, 2), cos.to(x.dtype), sin.to(x.dtype), positions=positions)

    tensors = {"x": normal(BATCH, HEADS, LENGTH, 16, dtype=torch.float32, device=device)}
    for actual in views.values():
        assert_follows(actual, formula, tensors)


def test_conjugate_turns_back(path, device):
    cos, sin = tables(LENGTH, 8, device)
    x = normal(BATCH, LENGTH, HEADS, 16, dtype=torch.float32, device=device)
    there = apply_rotary(x, cos, sin, interleaved=True)
    torch.testing.assert_close(apply_rotary(there, cos, sin, interleaved=True, conjugate=True), x)


@pytest.mark.parametrize("layout", ["mha", "gqa"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("has_own_k_tables", [False, True])
@pytest.mark.parametrize("is_contiguous", [False, True])
def test_packed_qkv(path, device, layout, interleaved, has_own_k_tables, is_contiguous):
    cos, sin = tables(LENGTH + 3, 8, device)
    cos_k, sin_k = (cos * 1.5, sin * 1.5) if has_own_k_tables else (None, None)
    shape, heads = ((BATCH, LENGTH, 3, HEADS, 20), None) if layout == "mha" else ((BATCH, LENGTH, 8, 20), 4)
    positions = torch.arange(LENGTH, device=device) + 3

    def actual(qkv):
        qkv = qkv * 1
        if not is_contiguous:
            qkv = torch.cat((qkv, qkv), -1)[..., :20]
        out = apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, interleaved, 3, heads)
        assert out.data_ptr() == qkv.data_ptr()
        return out

    def formula(qkv):
        q, k, v = qkv.unbind(2) if layout == "mha" else qkv.split([4, 2, 2], 2)
        turn = partial(formulas.rotary, positions=positions, interleaved=interleaved)
        c, s = cos.to(qkv.dtype), sin.to(qkv.dtype)
        q = turn(q, c, s)
        k = turn(k, *((c * 1.5, s * 1.5) if has_own_k_tables else (c, s)))
        return torch.stack((q, k, v), 2) if layout == "mha" else torch.cat((q, k, v), 2)

    assert_follows(actual, formula, {"qkv": normal(*shape, dtype=torch.float32, device=device)})


def test_packed_kv(path, device):
    cos, sin = tables(LENGTH, 8, device)

    def formula(kv):
        k = formulas.rotary(
            kv[:, :, 0], cos.to(kv.dtype), sin.to(kv.dtype), positions=torch.arange(LENGTH, device=kv.device)
        )
        return torch.stack((k, kv[:, :, 1]), 2)

    def actual(kv):
        return apply_rotary_emb_kv_(kv * 1, cos, sin)

    assert_follows(actual, formula, {"kv": normal(BATCH, LENGTH, 2, HEADS, 20, dtype=torch.float32, device=device)})


def test_in_place_on_a_leaf_turns_the_incoming_gradient_too(path, device):
    cos, sin = tables(LENGTH, 8, device)
    leaf = normal(BATCH, LENGTH, HEADS, 16, dtype=torch.float32, device=device).requires_grad_()
    expected = apply_rotary(leaf.detach(), cos, sin)
    out = apply_rotary_emb(leaf, cos, sin, inplace=True)
    assert torch.equal(out, expected)
    assert torch.equal(leaf, expected)
    arriving = normal(*leaf.shape, dtype=torch.float32, device=device, seed=1)
    turned_back = apply_rotary(arriving, cos, sin, conjugate=True)
    out.backward(arriving)
    assert torch.equal(leaf.grad, turned_back)
    assert torch.equal(arriving, turned_back)


def test_the_plain_formula(device):
    cos, sin = tables(LENGTH, 8, device)
    x = normal(BATCH, LENGTH, HEADS, 20, dtype=torch.float32, device=device)
    for interleaved in (False, True):
        torch.testing.assert_close(
            apply_rotary_emb_torch(x, cos, sin, interleaved), apply_rotary(x, cos, sin, interleaved=interleaved)
        )
    assert torch.equal(rotate_half(torch.tensor([1, 2, 3, 4])), torch.tensor([-3, -4, 1, 2]))
    assert torch.equal(rotate_half(torch.tensor([1, 2, 3, 4]), interleaved=True), torch.tensor([-2, 1, -4, 3]))
    assert apply_rotary_emb_func is apply_rotary_emb


def test_what_cannot_be(path, device):
    cos, sin = tables(LENGTH, 8, device)
    x = torch.zeros(BATCH, LENGTH, HEADS, 16, device=device)
    cu_seqlens = torch.tensor([0, 7], dtype=torch.int32, device=device)
    wrong = [
        ({"cu_seqlens": cu_seqlens, "x": x[0]}, "max_seqlen"),
        ({"sin": sin[:-1]}, "same shape"),
        ({"x": x[..., :14]}, "rotary_dim"),
        ({"x": torch.zeros(1, 1, 1, 260, device=device)}, "256"),
        ({"cos": cos[:-1], "sin": sin[:-1]}, "rows"),
        ({"seqlen_offsets": 1}, "seqlen_offsets"),
        ({"seqlen_offsets": torch.zeros(3, dtype=torch.int32, device=device)}, "shape"),
        ({"seqlen_offsets": torch.zeros(2, device=device)}, "int32"),
    ]
    for change, word in wrong:
        with pytest.raises(AssertionError, match=word):
            apply_rotary(**({"x": x, "cos": cos, "sin": sin} | change))


@pytest.mark.parametrize("scale_base", [None, 512])
@pytest.mark.parametrize("is_packed", [False, True])
def test_module(path, device, scale_base, is_packed):
    module = RotaryEmbedding(16, scale_base=scale_base, device=device)
    assert not module.state_dict()
    q, k, v = (normal(BATCH, LENGTH, HEADS, 24, dtype=torch.float32, device=device, seed=i) for i in range(3))
    if is_packed:
        turned_q, turned_k, same_v = module(torch.stack((q, k, v), 2), seqlen_offset=2).unbind(2)
    else:
        turned_q, kv = module(q.clone(), torch.stack((k, v), 2), seqlen_offset=2)
        turned_k, same_v = kv.unbind(2)
    length = LENGTH + 2
    t = torch.arange(length, dtype=torch.float64, device=device)
    dims = torch.arange(0, 16, 2, dtype=torch.float64, device=device)
    angles = t[:, None] * 10000.0 ** (-dims / 16)
    zeta = 1.0 if scale_base is None else ((dims + 6.4) / 22.4) ** ((t - length // 2) / 512)[:, None]
    positions = torch.arange(LENGTH, device=device) + 2
    expected_q = formulas.rotary(q.double(), angles.cos() * zeta, angles.sin() * zeta, positions=positions)
    expected_k = formulas.rotary(k.double(), angles.cos() / zeta, angles.sin() / zeta, positions=positions)
    torch.testing.assert_close(turned_q.double(), expected_q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned_k.double(), expected_k, rtol=1e-5, atol=1e-5)
    assert torch.equal(same_v, v)


def test_module_keeps_its_tables(device):
    module = RotaryEmbedding(16, device=device)
    where = module.inv_freq.device  # a bare "cuda" would differ from the "cuda:0" of what was made there
    module._update_cos_sin_cache(8, device=where, dtype=torch.float32)
    first = module._cos_cached
    module._update_cos_sin_cache(5, device=where, dtype=torch.float32)
    assert module._cos_cached is first
    module._update_cos_sin_cache(9, device=where, dtype=torch.float32)
    assert module._cos_cached.shape == (9, 8)
    module.to(torch.bfloat16)._update_cos_sin_cache(9, device=torch.device(device), dtype=torch.bfloat16)
    exact = RotaryEmbedding(16, device=device)
    exact._update_cos_sin_cache(9, device=torch.device(device), dtype=torch.bfloat16)
    assert torch.equal(module._cos_cached, exact._cos_cached)


def test_module_with_a_tensor_offset_uses_the_tables_at_hand(path, device):
    module = RotaryEmbedding(16, device=device)
    q = normal(BATCH, 1, HEADS, 16, dtype=torch.float32, device=device)
    kv = normal(BATCH, 1, 2, HEADS, 16, dtype=torch.float32, device=device)
    offsets = torch.tensor([3, 5], dtype=torch.int32, device=device)
    turned, _ = module(q.clone(), kv, seqlen_offset=offsets, max_seqlen=8)
    for n, offset in enumerate((3, 5)):
        alone, _ = module(q[n : n + 1].clone(), kv[n : n + 1].clone(), seqlen_offset=offset)
        assert torch.equal(turned[n : n + 1], alone)


def test_in_place_under_an_expanded_gradient(path, device):
    cos, sin = tables(LENGTH, 8, device)
    ones = torch.ones(BATCH, LENGTH, HEADS, 16, device=device)
    turned = apply_rotary(ones, cos, sin, conjugate=True)
    x = torch.zeros_like(ones, requires_grad=True)
    apply_rotary_emb(x, cos, sin, inplace=True).sum().backward()
    torch.testing.assert_close(x.grad, turned)
    qkv = torch.zeros(BATCH, LENGTH, 3, HEADS, 16, device=device, requires_grad=True)
    apply_rotary_emb_qkv_(qkv, cos, sin).sum().backward()
    torch.testing.assert_close(qkv.grad, torch.stack((turned, turned, ones), dim=2))
    kv = torch.zeros(BATCH, LENGTH, 2, HEADS, 16, device=device, requires_grad=True)
    apply_rotary_emb_kv_(kv, cos, sin).sum().backward()
    torch.testing.assert_close(kv.grad, torch.stack((turned, ones), dim=2))


def test_without_autograd_a_leaf_may_be_turned_in_place(path, device):
    cos, sin = tables(LENGTH, 8, device)
    x = torch.ones(BATCH, LENGTH, HEADS, 16, device=device, requires_grad=True)
    copy = apply_rotary(x, cos, sin)
    assert not copy.requires_grad
    assert apply_rotary(x, cos, sin, inplace=True) is x
    torch.testing.assert_close(x.detach(), copy)


def test_module_names_what_a_tensor_offset_lacks(device):
    offset = torch.zeros(BATCH, dtype=torch.int32, device=device)
    with pytest.raises(AssertionError, match="max_seqlen"):
        RotaryEmbedding(16, device=device)(torch.zeros(BATCH, 3, 3, HEADS, 16, device=device), seqlen_offset=offset)
