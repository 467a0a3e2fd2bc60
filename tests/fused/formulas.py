"""Plain PyTorch formulas, differentiable and in whatever precision their inputs have, and how results are held to them.

The float64 run of a formula is the truth; its run in the inputs' own dtypes gives the error of plain PyTorch, which
sets the scale of what `assert_close` allows.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus.testing import assert_close

Named = dict[str, Tensor | None]


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Seeded normal numbers, equal on every device."""
    random = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=random, dtype=torch.float64) * scale).to(device, dtype)


def _outputs(result: Tensor | Sequence[Tensor | None]) -> list[Tensor]:
    results = (result,) if isinstance(result, Tensor) else result
    return [x for x in results if x is not None and x.is_floating_point()]


def _run(function: Callable, tensors: Named, arriving: list[Tensor] | None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of all floating-point inputs."""
    leaves = {
        name: x if x is None or not x.is_floating_point() else x.detach().clone().requires_grad_()
        for name, x in tensors.items()
    }
    outputs = _outputs(function(**leaves))
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    with_gradient = [x for x in outputs if x.requires_grad]
    if arriving is None:
        arriving = [normal(*x.shape, dtype=x.dtype, device=x.device.type, seed=7 + i) for i, x in enumerate(outputs)]
    arriving = [g.to(x.dtype) for x, g in zip(outputs, arriving, strict=True)]
    pairs = [(x, g) for x, g in zip(outputs, arriving, strict=True) if x.requires_grad]
    assert with_gradient, "the test differentiates nothing"
    found = torch.autograd.grad(
        [x for x, _ in pairs], list(wanted.values()), [g.clone() for _, g in pairs], allow_unused=True
    )
    return [x.detach() for x in outputs], dict(zip(wanted, found, strict=True))


def assert_follows(
    actual: Callable, formula: Callable, tensors: Named, without_gradient: Sequence[str] = ()
) -> list[Tensor]:
    """Hold every output and every gradient of `actual(**tensors)` to `formula(**tensors)`; returns the outputs."""
    outputs, gradients = _run(actual, tensors, None)
    arriving = [normal(*x.shape, dtype=x.dtype, device=x.device.type, seed=7 + i) for i, x in enumerate(outputs)]
    wide = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in tensors.items()}
    truth, true_gradients = _run(formula, wide, arriving)
    eager, eager_gradients = _run(formula, tensors, arriving)
    assert len(outputs) == len(truth)
    for i, (a, t, e) in enumerate(zip(outputs, truth, eager, strict=True)):
        assert_close(f"output {i}", a, t, e)
    for name, gradient in gradients.items():
        if name in without_gradient:
            assert gradient is None, f"{name} has a gradient"
            continue
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.dtype == tensors[name].dtype
        assert_close(f"gradient of {name}", gradient, true_gradients[name], eager_gradients[name])
    return outputs


def norm(
    x, weight, bias=None, residual=None, x1=None, weight1=None, bias1=None, rowscale=None, *, eps=1e-6, dropout_p=0.0,
    keep=None, keep1=None, is_rms_norm=False, zero_centered_weight=False, prenorm=False,
):  # fmt: skip
    """y, y1 with weight1, t with prenorm."""
    t = x if rowscale is None else x * rowscale[..., None]
    if keep is not None:
        t = t * keep / (1.0 - dropout_p)
    if x1 is not None:
        t = t + (x1 if keep1 is None else x1 * keep1 / (1.0 - dropout_p))
    if residual is not None:
        t = t + residual
    centred = t if is_rms_norm else t - t.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    results = []
    for w, b in ((weight, bias), (weight1, bias1)):
        if w is not None:
            y = normed * (w + 1.0 if zero_centered_weight else w)
            results.append(y if b is None else y + b)
    return [*results, t] if prenorm else results


def cross_entropy(logits, labels, *, smoothing=0.0, scale=1.0, lse_square_scale=0.0, ignore_index=-100):
    """(losses, z_losses) for labels inside the vocabulary."""
    x = logits * scale
    lse = x.logsumexp(-1)
    counted = labels != ignore_index
    picked = x.gather(1, labels.where(counted, 0)[:, None])[:, 0]
    z = lse_square_scale * lse.square()
    losses = lse - (1.0 - smoothing) * picked - smoothing * x.mean(-1) + z
    return losses.where(counted, 0.0), z.where(counted, 0.0).detach()


def rotary(x, cos, sin, *, positions, interleaved=False):
    """x (..., heads, d) turned by row `positions` (...) of the tables; -1 leaves a token as it is."""
    half = cos.shape[1]
    known = (positions >= 0)[..., None]
    c = cos[positions].where(known, 1.0)[..., None, :]
    s = sin[positions].where(known, 0.0)[..., None, :]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    x0, x1 = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    y0, y1 = x0 * c - x1 * s, x0 * s + x1 * c
    y = torch.stack((y0, y1), -1).flatten(-2) if interleaved else torch.cat((y0, y1), -1)
    return torch.cat((y, rest), -1)


ACTIVATIONS = {
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "gelu": F.gelu,
    "gelu_approx": lambda x: F.gelu(x, approximate="tanh"),
}
