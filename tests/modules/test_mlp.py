"""Feed-forward layers."""

import pytest
import torch
import torch.nn.functional as F
from flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp

X = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_plain():
    module = Mlp(12, out_features=7, activation=F.relu).double()
    assert module.fc1.out_features == 48
    torch.testing.assert_close(module(X), module.fc2(module.fc1(X).relu()))


@pytest.mark.parametrize("activation", [F.sigmoid, F.silu, F.gelu])
def test_value_is_the_first_half_and_gate_the_second(activation):
    module = GatedMlp(12, hidden_features=16, activation=activation, multiple_of=8).double()
    value, gate = module.fc1(X).split(16, dim=-1)
    expected = module.fc2(value * activation(gate))
    torch.testing.assert_close(module(X), expected)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * weight).sum(), list(module.parameters())) for y in (module(X), expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("hidden", "multiple_of", "expected"), [(None, 128, 128), (None, 1, 32), (20, 8, 24), (16, 8, 16), (129, 128, 256)]
)
def test_hidden_size_of_gated(hidden, multiple_of, expected):
    module = GatedMlp(12, hidden_features=hidden, multiple_of=multiple_of)
    assert module.fc1.weight.shape == (2 * expected, 12)
    assert module.fc2.weight.shape == (12, expected)


@pytest.mark.parametrize("cls", [Mlp, GatedMlp, FusedMLP])
def test_residual_and_biases(cls):
    module = cls(12, bias1=False, bias2=False, return_residual=True).double()
    out, residual = module(X)
    assert torch.equal(residual, X)
    assert set(dict(module.named_parameters())) == {"fc1.weight", "fc2.weight"}
    plain = cls(12, bias1=False, bias2=False).double()
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(out, plain(X))


def test_fused_is_plain():
    plain, fused = Mlp(12, activation=lambda x: F.gelu(x, approximate="tanh")).double(), FusedMLP(12).double()
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(X), plain(X))
