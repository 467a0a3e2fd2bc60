"""Every fused operation inside one graph: `torch.compile(fullgraph=True)` gives what eager gives."""

import pytest
import torch
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.activations import bias_gelu_impl, fast_gelu_impl, swiglu
from flash_attn.ops.fused_dense import fused_dense_func, fused_mlp_func
from flash_attn.ops.layer_norm import dropout_add_layer_norm
from flash_attn.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn, rms_norm_fn
from formulas import normal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
LABELS = torch.tensor([1, -100, 3, 0])


def norm(x, weight, bias, other):
    return layer_norm_fn(x, weight, bias, residual=other, prenorm=True)


def rms_norm(x, weight, bias, other):
    return rms_norm_fn(x, weight, None, residual=other, residual_in_fp32=True)


def norm_linear(x, weight, bias, other):
    return layer_norm_linear_fn(x, weight, bias, other, None, prenorm=True)


def norm_extension(x, weight, bias, other):
    return dropout_add_layer_norm(x, other, weight, bias, 0.0, 1e-5, layerscale=bias)


def cross_entropy(x, weight, bias, other):
    return CrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.1)(x, LABELS.to(x.device))


def cross_entropy_inplace(x, weight, bias, other):
    return CrossEntropyLoss(inplace_backward=True)(x * 2, LABELS.to(x.device))


def activations(x, weight, bias, other):
    return swiglu(x, other), bias_gelu_impl(x, bias), fast_gelu_impl(other)


def dense(x, weight, bias, other):
    out, residual = fused_dense_func(x, other, weight[:4], return_residual=True)
    return out, residual * 2


def mlp(x, weight, bias, other):
    return fused_mlp_func(x, other, other.t(), weight[:4], bias, "sqrelu", checkpoint_lvl=1)


def tables(device):
    angles = torch.arange(32, dtype=torch.float32, device=device).view(8, 4)
    return angles.cos(), angles.sin()


def rotary(x, weight, bias, other):
    return apply_rotary_emb(x.view(1, 4, 2, 16), *tables(x.device.type), interleaved=True)


def rotary_in_place(x, weight, bias, other):
    return apply_rotary_emb((x * 2).view(1, 4, 2, 16), *tables(x.device.type), inplace=True, seqlen_offsets=2)


def rotary_qkv(x, weight, bias, other):
    offsets = torch.tensor([3], dtype=torch.int32, device=x.device)
    return apply_rotary_emb_qkv_(
        (x * 2).view(1, 4, 4, 8), *tables(x.device.type), seqlen_offsets=offsets, num_heads_q=2
    )


def rotary_kv(x, weight, bias, other):
    return apply_rotary_emb_kv_((x * 2).view(1, 4, 2, 2, 8), *tables(x.device.type))


FUNCTIONS = (
    norm, rms_norm, norm_linear, norm_extension, cross_entropy, cross_entropy_inplace, activations, dense, mlp,
    rotary, rotary_in_place, rotary_qkv, rotary_kv,
)  # fmt: skip


def run(function, device):
    tensors = [
        normal(*shape, dtype=torch.float32, device=device, seed=i).requires_grad_()
        for i, shape in enumerate(((4, 32), (32,), (32,), (4, 32)))
    ]
    results = function(*tensors)
    results = (results,) if isinstance(results, torch.Tensor) else results
    arriving = [normal(*r.shape, dtype=r.dtype, device=device, seed=9) for r in results]
    grads = torch.autograd.grad(results, tensors, arriving, allow_unused=True)
    return [*(r.detach() for r in results), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_full_graph(device, function):
    torch._dynamo.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = run(torch.compile(function, fullgraph=True, backend=backend), device)
    eager = run(function, device)
    assert len(compiled) == len(eager) > 1
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_pass_torchs_checks(device):
    x, labels = normal(4, 32, dtype=torch.float32, device=device), torch.tensor([1, 2, -100, 4], device=device)
    numbers = (0.1, 1.0, 0.0, -100, 0, 32)
    ops = torch.ops.flash_attn_plus
    losses, lse, _ = ops.cross_entropy_forward(x, labels, None, *numbers, False)
    y, rstd, grad = torch.empty_like(x), torch.empty(4, device=device), torch.empty(32, device=device)
    for op, arguments in (
        (ops.cross_entropy_forward, (x, labels, None, *numbers, False)),
        (ops.cross_entropy_backward, (losses, x, lse, labels, *numbers)),
        (ops.cross_entropy_backward_, (losses, x.clone(), lse, labels, *numbers)),
        (ops.activation_forward, (x, x[0], "gelu")),
        (ops.activation_backward, (x, x, None, "relu")),
        (ops.swiglu_forward, (x, x)),
        (ops.swiglu_backward, (x, x, x)),
        (ops.norm_forward, (x, x[0], *[None] * 7, 1e-6, 0.0, False, True, y, None, None, None, rstd, None, None)),
        (ops.norm_backward, (x, x, x[0], *[None] * 7, rstd, 0.0, False, True, y, *[None] * 3, grad, *[None] * 3)),
    ):
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op.default, arguments, test_utils=tests)
