"""Norms of rows that are too long for one program to hold well: they are read again, or staged in shared memory."""

from functools import partial
from unittest import mock

import formulas
import pytest
import torch
from flash_attn.ops.triton.layer_norm import layer_norm_fn
from formulas import assert_follows, normal

from flash_attn_plus import use_backend
from flash_attn_plus.device import Device, assumed, probe
from flash_attn_plus.fused import norm_gluon
from flash_attn_plus.fused.norm import norm_forward

COLS = 4100  # more than half of the 8192 that a program would hold


def tensors(rows, cols, dtype, device, *names):
    """Inputs of a norm by name: rows of `cols` features, or one number a feature, or a row."""
    shapes = {"x": (rows, cols), "x1": (rows, cols), "residual": (rows, cols), "rowscale": (rows,)}
    return {
        name: normal(*shapes.get(name, (cols,)), dtype=dtype, device=device, seed=i) for i, name in enumerate(names)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_plain(path, device, dtype, is_rms_norm):
    x = tensors(3, COLS, dtype, device, "x", "weight", *(() if is_rms_norm else ("bias",)))
    x.setdefault("bias", None)
    assert_follows(partial(layer_norm_fn, is_rms_norm=is_rms_norm), partial(formulas.norm, is_rms_norm=is_rms_norm), x)


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_two_branches_and_a_residual(path, device, is_rms_norm):
    names = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    x = tensors(2, COLS, torch.float32, device, *names)
    options = {"is_rms_norm": is_rms_norm, "zero_centered_weight": True, "prenorm": True}
    assert_follows(partial(layer_norm_fn, **options), partial(formulas.norm, **options), x)


def test_rowscale(path, device):
    x = tensors(3, COLS, torch.float32, device, "x", "weight", "bias", "rowscale")
    scale = x.pop("rowscale")

    def formula(x, weight, bias):
        return formulas.norm(x, weight, bias, rowscale=scale.to(x.dtype))

    assert_follows(partial(layer_norm_fn, rowscale=scale), formula, x)


def test_a_mean_far_from_zero_costs_no_accuracy(path, device):
    x = tensors(2, COLS, torch.float32, device, "x", "weight", "bias")
    x["x"] += 1000.0
    assert_follows(layer_norm_fn, formulas.norm, x)


def test_outputs_may_overwrite_inputs(path, device):
    x = tensors(3, COLS, torch.float32, device, "x", "weight", "bias", "residual")
    separate = norm_forward(x["x"], x["weight"], x["bias"], 1e-6, x["residual"])
    y, _, _, _, t, *_ = norm_forward(
        x["x"], x["weight"], x["bias"], 1e-6, x["residual"], out=x["x"], residual_out=x["residual"]
    )
    assert y.data_ptr() == x["x"].data_ptr()
    assert torch.equal(y, separate[0])
    assert torch.equal(t, separate[4])


def is_staged(dy, t, weight, dt=None, has_bias=True):
    """Whether a Hopper GPU with the right Triton would take these through shared memory."""
    facts = Device("cuda90", 227 * 1024, 132)
    with assumed(t.device, facts), mock.patch.object(norm_gluon, "_has_gluon", return_value=True):
        return norm_gluon.serves(dy, t, weight, dt, has_bias)


def test_what_is_staged():
    def rows(cols, dtype=torch.bfloat16):
        return torch.empty(4, cols, dtype=dtype)

    x, weight = rows(16384), torch.empty(16384, dtype=torch.bfloat16)
    assert is_staged(x, x, weight)
    assert is_staged(x, x, weight, rows(16384, torch.float16))
    assert is_staged(x, x, weight, x, has_bias=False)
    assert not is_staged(x, x, weight, has_bias=False)
    assert not is_staged(rows(8192), rows(8192), weight[:8192])
    assert not is_staged(rows(16000 + 8), rows(16000 + 8), weight[: 16000 + 8])
    assert not is_staged(x, x, weight, rows(16384, torch.float32))
    assert not is_staged(rows(16384, torch.float32), x, weight)
    assert not is_staged(x, x, weight.float())
    assert not is_staged(rows(16384 + 8)[:, :16384], x, weight)
    assert not is_staged(rows(16384 + 16)[:, 4 : 16384 + 4], x, weight)
    with use_backend("triton"):
        assert not is_staged(x, x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cols", [8208, 12304, 16384])
@pytest.mark.parametrize(("is_rms_norm", "has_residual"), [(False, False), (False, True), (True, True)])
def test_staged_rows(device, dtype, cols, has_residual, is_rms_norm):
    if device != "cuda" or probe(torch.device("cuda", 0)).family != "cuda90" or not norm_gluon._has_gluon():
        pytest.skip("needs a Hopper GPU and the Triton that its Gluon kernels are written for")
    names = ("x", "weight", *(() if is_rms_norm else ("bias",)), *(("residual",) if has_residual else ()))
    x = tensors(300, cols, dtype, device, *names)  # more rows than programs
    x.setdefault("bias", None)
    options = {"is_rms_norm": is_rms_norm, "zero_centered_weight": has_residual, "prenorm": has_residual}
    with mock.patch.object(norm_gluon, "norm_backward", wraps=norm_gluon.norm_backward) as staged:
        assert_follows(partial(layer_norm_fn, **options), partial(formulas.norm, **options), x)
        assert_follows(partial(layer_norm_fn, **options), partial(formulas.norm, **options), x)
    assert staged.call_count == 2  # the second time by what the first compiled
