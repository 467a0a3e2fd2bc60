"""diffusers: the attention backends `flash` and `flash_varlen` in a tiny random Flux, and its ring's calls."""

import copy

import pytest
import torch
from programs import operator_calls, require

from flash_attn_plus.testing import Case, assert_close, make_inputs, run_reference

diffusers = require("diffusers")
from diffusers.models import attention_dispatch  # noqa: E402

FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
}  # fmt: skip
ATTENTIONS = FLUX["num_layers"] + FLUX["num_single_layers"]


def image(dtype, device) -> dict[str, torch.Tensor]:
    """Inputs of a transformer step on a 4 x 4 latent and 7 words."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)

    return {
        "hidden_states": normal(1, 16, 4),
        "encoder_hidden_states": normal(1, 7, 32),
        "pooled_projections": normal(1, 32),
        "timestep": torch.tensor([0.3], dtype=dtype, device=device),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)).to(device),
        "txt_ids": torch.zeros(7, 3, device=device),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
def test_flux(backend, dtype, device):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**FLUX).to(device, dtype)
    plain, reference = copy.deepcopy(model), copy.deepcopy(model).double()
    model.set_attention_backend(backend)
    for other in (plain, reference):
        other.set_attention_backend("_native_math")

    def compute(model):
        out = model(**image(model.dtype, device), return_dict=False)[0]
        model.zero_grad()
        out.square().sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat((out.detach().flatten(), *grads))

    with operator_calls() as calls:
        expected, eager = compute(reference), compute(plain)
    assert not calls
    with operator_calls() as calls:
        actual = compute(model)
    kind = " packed" if backend == "flash_varlen" else ""
    assert calls == {"forward" + kind: ATTENTIONS, "backward" + kind: ATTENTIONS}
    assert_close("output and gradients", actual, expected, eager)


class Context:
    """What autograd hands to the operators of a ring."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("is_causal", [False, True])
def test_operators_of_its_ring_attention(is_causal, device):
    """Forward and backward through torch.ops, with the lse in (b, s, h) between them."""
    call = make_inputs(Case(2, 9, 9, 2, 2, 16, right=0 if is_causal else -1), torch.bfloat16, device)
    context, x = Context(), call.inputs
    with operator_calls() as calls:
        out, lse = attention_dispatch._flash_attention_forward_op(
            context, x.q, x.k, x.v, is_causal=is_causal, return_lse=True
        )
        dq, dk, dv = attention_dispatch._flash_attention_backward_op(context, call.dout)
    assert calls == {"forward": 1, "backward": 1}
    expected = run_reference(call, torch.float64, with_gradients=True)
    eager = run_reference(call, torch.bfloat16, with_gradients=True)
    actual = {"out": out, "lse": lse.permute(0, 2, 1), "dq": dq, "dk": dk, "dv": dv}
    for name, value in actual.items():
        assert_close(name, value, expected[name], eager[name])


def test_dispatch_returns_the_lse(device):
    call = make_inputs(Case(2, 9, 9, 2, 2, 16), torch.bfloat16, device)
    x = call.inputs
    with attention_dispatch.attention_backend("flash"):
        out, lse = attention_dispatch.dispatch_attention_fn(x.q, x.k, x.v, attention_kwargs={"return_lse": True})
    expected, eager = (run_reference(call, t, with_gradients=False) for t in (torch.float64, torch.bfloat16))
    assert_close("out", out, expected["out"], eager["out"])
    assert_close("lse", lse, expected["lse"], eager["lse"])
