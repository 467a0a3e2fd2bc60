"""Derivatives that the functions do not have raise: they must not come out as zeros, or vanish from a loss."""

import flash_attn
import pytest
import torch
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_
from flash_attn.ops.activations import bias_gelu_impl, fast_gelu_impl, swiglu
from flash_attn.ops.fused_dense import fused_mlp_func
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn
from flash_attn.ops.triton.mlp import fused_dense_sqrelu_dense_function
from torch.autograd import forward_ad

from flash_attn_plus import InvalidArgument, attention, attention_with_kvcache, block_sparse_attention

STARTS = torch.tensor([0, 5, 8], dtype=torch.int32)
DENSE = (1, 8, 2, 8)
CALLS = {
    "attention": (lambda q, k: attention(q, k, k, causal=True), (DENSE, DENSE)),
    "block_sparse": (lambda q, k: block_sparse_attention(q, k, k, torch.ones(1, 1, dtype=torch.bool)), (DENSE, DENSE)),
    "flash_attn_func": (lambda q, k: flash_attn.flash_attn_func(q, k, k), (DENSE, DENSE)),
    "qkvpacked": (flash_attn.flash_attn_qkvpacked_func, ((1, 8, 3, 2, 8),)),
    "kvpacked": (flash_attn.flash_attn_kvpacked_func, (DENSE, (1, 8, 2, 2, 8))),
    "varlen": (
        lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, STARTS, 5),
        ((8, 3, 2, 8),),
    ),
    "layer_norm": (lambda x, w: layer_norm_fn(x, w, w), ((3, 8), (8,))),
    "layer_norm_linear": (lambda x, w, m: layer_norm_linear_fn(x, w, None, m, None), ((3, 8), (8,), (4, 8))),
    "mlp": (fused_mlp_func, ((3, 8), (16, 8), (8, 16))),
    "squared_relu_mlp": (fused_dense_sqrelu_dense_function, ((3, 8), (16, 8), (16,), (8, 16), (8,))),
    "swiglu": (swiglu, ((3, 8), (3, 8))),
    "bias_gelu": (bias_gelu_impl, ((3, 8), (8,))),
    "gelu": (fast_gelu_impl, ((3, 8),)),
    "cross_entropy": (lambda x: cross_entropy_loss(x, torch.tensor([1, 5, 2]))[0], ((3, 8),)),
    "rotary": (lambda x: apply_rotary_emb(x, torch.ones(8, 4), torch.ones(8, 4)), (DENSE,)),
    "rotary_qkv": (lambda x: apply_rotary_emb_qkv_(x * 1, torch.ones(8, 4), torch.ones(8, 4)), ((1, 8, 3, 2, 8),)),
    "rotary_kv": (lambda x: apply_rotary_emb_kv_(x * 1, torch.ones(8, 4), torch.ones(8, 4)), ((1, 8, 2, 2, 8),)),
}


@pytest.mark.parametrize(("call", "shapes"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("power", [1, 2], ids=["sum", "sum of squares"])
def test_a_penalty_on_gradients_raises_instead_of_training_nothing(call, shapes, power):
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    loss = call(*inputs).pow(power).sum()
    for gradient in torch.autograd.grad(loss, inputs, create_graph=True):
        total = gradient.square().sum() + sum(x.sum() for x in inputs)
        with pytest.raises(InvalidArgument, match="second derivative"):
            torch.autograd.grad(total, inputs[0], retain_graph=True)


def test_first_derivatives_with_a_graph_are_those_without():
    q = torch.randn(DENSE, requires_grad=True)
    out = attention(q, q, q, causal=True)
    plain = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    kept = torch.autograd.grad(out.sum(), q, create_graph=True)[0]
    assert torch.equal(plain, kept)
    kept.detach().mul_(2.0)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["fused", "tiles"])
def test_forward_mode_raises_instead_of_returning_zeros(options):
    q = torch.randn(DENSE)
    with pytest.raises(InvalidArgument, match="forward-mode"):
        torch.func.jvp(lambda x: attention(x, x, x, **options), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(InvalidArgument, match="forward-mode"):
        attention(q, q, forward_ad.make_dual(q, q), **options)
    with pytest.raises(InvalidArgument, match="forward-mode"):
        torch.func.jvp(lambda x: attention_with_kvcache(q, x, x), (q,), (q,))


def test_forward_mode_of_other_tensors_is_let_through():
    q, scale = torch.randn(DENSE), torch.ones(())
    _, tangent = torch.func.jvp(lambda s: s * attention(q, q, q), (scale,), (scale,))
    assert torch.equal(tangent, attention(q, q, q))


def test_nested_tensors_are_told_where_to_go():
    x = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged)
    with pytest.raises(InvalidArgument, match="nested"):
        attention(x, x, x)
