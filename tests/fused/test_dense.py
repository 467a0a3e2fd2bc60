"""Dense layers, MLPs and patch embedding on one process."""

from itertools import pairwise

import formulas
import pytest
import torch
import torch.nn.functional as F
from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.ops.fused_dense import FusedDense, FusedMLP, fused_dense_func, fused_mlp_func
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense
from formulas import assert_follows, normal

NAMES = {"gelu_approx": "gelu_approx", "relu": "relu", "sqrelu": "squared_relu"}


def parameters(device, dtype, *sizes):
    """x, then weight and bias of each layer."""
    made = {"x": normal(3, 4, sizes[0], dtype=dtype, device=device)}
    for i, (n, m) in enumerate(pairwise(sizes), 1):
        made[f"weight{i}"] = normal(m, n, dtype=dtype, device=device, seed=i, scale=n**-0.5)
        made[f"bias{i}"] = normal(m, dtype=dtype, device=device, seed=i)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("return_residual", [False, True])
def test_dense(path, device, dtype, return_residual):
    def actual(x, weight1, bias1):
        result = fused_dense_func(x, weight1, bias1, return_residual=return_residual)
        return (result[0], result[1] * 2) if return_residual else result

    def formula(x, weight1, bias1):
        out = F.linear(x, weight1, bias1)
        return (out, x * 2) if return_residual else out

    assert_follows(actual, formula, parameters(device, dtype, 24, 40))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
@pytest.mark.parametrize("return_residual", [False, True])
def test_mlp(path, device, activation, checkpoint_lvl, return_residual):
    def actual(x, weight1, bias1, weight2, bias2):
        result = fused_mlp_func(
            x, weight1, weight2, bias1, bias2, activation,
            checkpoint_lvl=checkpoint_lvl, return_residual=return_residual,
        )  # fmt: skip
        return (result[0], result[1] * 2) if return_residual else result

    def formula(x, weight1, bias1, weight2, bias2):
        out = F.linear(formulas.ACTIVATIONS[NAMES[activation]](F.linear(x, weight1, bias1)), weight2, bias2)
        return (out, x * 2) if return_residual else out

    assert_follows(actual, formula, parameters(device, torch.float32, 24, 48, 16))


@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
def test_checkpoint_levels_keep_less(path, device, checkpoint_lvl):
    tensors = {n: x.requires_grad_() for n, x in parameters(device, torch.float32, 24, 48, 16).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fused_mlp_func(
            tensors["x"], tensors["weight1"], tensors["weight2"], tensors["bias1"], tensors["bias2"],
            checkpoint_lvl=checkpoint_lvl,
        )  # fmt: skip
    assert sum(x.shape == (3, 4, 48) for x in kept) == 2 - checkpoint_lvl


def test_mlp_without_biases_and_without_saving(path, device):
    made = parameters(device, torch.float32, 24, 48, 16)
    tensors = {n: made[n] for n in ("x", "weight1", "weight2")}

    def actual(x, weight1, weight2):
        return fused_mlp_func(x, weight1, weight2, save_pre_act=False)

    def formula(x, weight1, weight2):
        return F.linear(F.gelu(F.linear(x, weight1), approximate="tanh"), weight2)

    assert_follows(actual, formula, tensors)


def test_under_autocast(path, device):
    x = normal(4, 24, dtype=torch.float32, device=device).requires_grad_()
    dense, mlp = FusedDense(24, 16, return_residual=True, device=device), FusedMLP(24, 32, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, residual = dense(x)
        second = mlp(x)
    assert residual is x or residual.data_ptr() == x.data_ptr()
    assert out.dtype == second.dtype == torch.bfloat16
    (out.sum() + second.sum()).backward()
    assert x.grad.dtype == dense.weight.grad.dtype == mlp.fc1.weight.grad.dtype == torch.float32
    expected = F.linear(x.bfloat16(), dense.weight.bfloat16(), dense.bias.bfloat16())
    torch.testing.assert_close(out, expected)


def test_modules(path, device):
    x = normal(4, 24, dtype=torch.float32, device=device)
    mlp = FusedMLP(24, activation="sqrelu", device=device)
    assert mlp.fc1.weight.shape == (96, 24)
    expected = mlp.fc2(F.relu(mlp.fc1(x)).square())
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(mlp.eval()(x), expected)
    squared = FusedDenseSqreluDense(24, checkpoint_lvl=1, device=device)
    squared.load_state_dict(mlp.state_dict())
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(squared(leaf), expected)
    squared(leaf).sum().backward()
    (gradient,) = torch.autograd.grad(mlp(leaf).sum(), leaf)
    torch.testing.assert_close(leaf.grad, gradient)


def test_what_cannot_be():
    with pytest.raises(AssertionError, match="activation"):
        FusedMLP(8, activation="tanh")
    with pytest.raises(AssertionError, match="checkpoint_lvl"):
        FusedMLP(8, checkpoint_lvl=3)
    with pytest.raises(AssertionError, match="heuristic"):
        FusedMLP(8, heuristic=9)
    with pytest.raises(AssertionError, match="bias1"):
        FusedDenseSqreluDense(8, bias1=False)


@pytest.mark.parametrize("fused_bias_fc", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_patch_embedding_is_a_convolution(device, fused_bias_fc, flatten):
    module = PatchEmbed(
        (8, 12), 4, in_chans=3, embed_dim=10, norm_layer=torch.nn.LayerNorm, flatten=flatten,
        fused_bias_fc=fused_bias_fc,
    ).to(device)  # fmt: skip
    assert module.num_patches == 6
    assert module.grid_size == (2, 3)
    images = normal(2, 3, 8, 12, dtype=torch.float32, device=device)
    convolved = F.conv2d(images, module.proj.weight.view(10, 3, 4, 4), module.proj.bias, stride=4)
    expected = module.norm(convolved.permute(0, 2, 3, 1))
    expected = expected.flatten(1, 2) if flatten else expected
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="height"):
        module(images[:, :, :4])
    with pytest.raises(AssertionError, match="width"):
        module(images[..., :8])
