"""Blocks: order of sums and norms, the fused form, and what belongs to which layer."""

from functools import partial

import pytest
import torch
from flash_attn.modules.block import Block, ParallelBlock, StochasticDepth
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm
from torch import nn

X = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RESIDUAL = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MIXER, MLP = partial(MHA, num_heads=2), partial(Mlp, hidden_features=48)
NORMS = {"layer": nn.LayerNorm, "rms": RMSNorm}


def make(cls, **options):
    torch.manual_seed(0)
    block = cls(32, mixer_cls=options.pop("mixer_cls", MIXER), mlp_cls=options.pop("mlp_cls", MLP), **options).double()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return block


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fused", [False, True])
def test_prenorm_adds_the_branch_of_the_layer_before(norm, fused):
    block = make(Block, norm_cls=NORMS[norm], fused_dropout_add_ln=fused)
    for residual in (None, RESIDUAL):
        hidden, stream = block(X, residual)
        first = X if residual is None else X + residual
        second = first + block.mixer(block.norm1(first))
        torch.testing.assert_close(stream, second)
        torch.testing.assert_close(hidden, block.mlp(block.norm2(second)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("return_residual", [False, True])
def test_postnorm(norm, fused, return_residual):
    options = {"mixer_cls": partial(MIXER, return_residual=True), "mlp_cls": partial(MLP, return_residual=True)}
    block = make(
        Block, prenorm=False, norm_cls=NORMS[norm], fused_dropout_add_ln=fused, return_residual=return_residual,
        **options if return_residual else {},
    )  # fmt: skip
    plain = make(Block, prenorm=False, norm_cls=NORMS[norm])
    first = plain.norm1(plain.mixer(X) + X)
    torch.testing.assert_close(block(X), plain.norm2(plain.mlp(first) + first))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied_norm", [False, True])
def test_parallel_block(norm, fused, tied_norm):
    block = make(ParallelBlock, norm_cls=NORMS[norm], fused_dropout_add_ln=fused, tied_norm=tied_norm)
    assert hasattr(block, "norm2") == (not tied_norm)
    for second, residual in ((None, None), (X.flip(1), RESIDUAL)):
        h1, h2, stream = block(X, second, residual)
        total = sum(x for x in (X, second, residual) if x is not None)
        torch.testing.assert_close(stream, total)
        torch.testing.assert_close(h1, block.mixer(block.norm1(total)))
        torch.testing.assert_close(h2, block.mlp((block.norm1 if tied_norm else block.norm2)(total)))


@pytest.mark.parametrize("options", [{}, {"prenorm": False}])
def test_fused_form_has_the_same_gradients(options):
    grads = []
    for fused in (False, True):
        block = make(Block, fused_dropout_add_ln=fused, **options)
        x = X.clone().requires_grad_()
        out = block(x)
        out = out if torch.is_tensor(out) else out[0] + 2 * out[1]
        grads.append(torch.autograd.grad((out * RESIDUAL).sum(), (x, *block.parameters())))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("fused", [False, True])
def test_mixer_subset_ends_the_other_positions(fused):
    block = make(Block, mixer_cls=partial(MIXER, cross_attn=True), fused_dropout_add_ln=fused)
    whole, part = block(X, RESIDUAL), block(X, RESIDUAL, mixer_subset=slice(0, 1))
    for x, y in zip(whole, part, strict=True):
        torch.testing.assert_close(y, x[:, :1])
    with pytest.raises(AssertionError, match="mixer_subset"):
        make(Block, prenorm=False)(X, mixer_subset=slice(0, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_residual_in_float32(fused):
    block = make(Block, residual_in_fp32=True, fused_dropout_add_ln=fused).bfloat16()
    hidden, residual = block(X.bfloat16())
    assert (hidden.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    _, residual = block(hidden, residual)
    assert residual.dtype == torch.float32


def test_without_an_mlp():
    block = make(Block, mlp_cls=nn.Identity)
    assert not {"dropout2", "drop_path2", "norm2"} & dict(block.named_modules()).keys()
    hidden, residual = block(X)
    torch.testing.assert_close(residual, X)
    torch.testing.assert_close(hidden, block.mixer(block.norm1(X)))


def test_defaults():
    block = Block(128)
    assert isinstance(block.mixer, MHA)
    assert block.mixer.num_heads == 2
    assert block.mlp.fc1.out_features == 512
    assert [name for name, _ in block.named_children()] == [
        "mixer", "dropout1", "drop_path1", "norm1", "mlp", "dropout2", "drop_path2", "norm2",
    ]  # fmt: skip


class Zero(nn.Module):
    """A mixer that adds nothing, so that the stream shows what was dropped in front of it."""

    def __init__(self, dim):
        super().__init__()

    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [Block, ParallelBlock])
def test_dropout_and_stochastic_depth_in_training_only(fused, cls):
    options, kept_rows = ({"drop_path1": 0.5}, 0.5) if cls is Block else ({}, 1.0)
    block = make(cls, mixer_cls=Zero, resid_dropout1=0.25, fused_dropout_add_ln=fused, **options)
    x = torch.ones(400, 3, 32, dtype=torch.float64)
    assert torch.equal(block.eval()(x)[-1], x)
    torch.manual_seed(0)
    stream = block.train()(x)[-1]
    is_kept = stream != 0
    torch.testing.assert_close(stream[is_kept], torch.full_like(stream[is_kept], 1 / (0.75 * kept_rows)))
    rows = is_kept.flatten(1).any(1)
    assert rows.double().mean().item() == pytest.approx(kept_rows, abs=0.1)
    assert is_kept[rows].double().mean().item() == pytest.approx(0.75, abs=0.02)


def test_each_branch_of_a_parallel_block_has_its_own_dropout():
    block = make(ParallelBlock, mixer_cls=Zero, resid_dropout1=0.25, resid_dropout2=0.75).train()
    x = torch.ones(400, 3, 32, dtype=torch.float64)
    for first, second, p in ((x, 0 * x, 0.25), (0 * x, x, 0.75)):
        stream = block(first, second, 0 * x)[-1]
        assert (stream == 0).double().mean().item() == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth(mode):
    module, x = StochasticDepth(0.5, mode), torch.ones(1000, 3)
    torch.manual_seed(0)
    out = module(x)
    assert bool(((out == 0).all(1) | (out == 2).all(1)).all())
    assert (out[:, 0].unique().numel() == 1) == (mode == "batch")
    if mode == "row":
        assert out.mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(module.eval()(x), x)
    assert not StochasticDepth(1.0, mode)(x).any()


def test_marks():
    block = make(Block, sequence_parallel=True, mark_shared_params=True)
    for name, p in block.named_parameters():
        is_norm = name.startswith("norm")
        assert getattr(p, "_sequence_parallel", False) == is_norm
        assert getattr(p, "_shared_params", False) == is_norm


def test_what_does_not_go_together_is_refused():
    class OtherNorm(nn.Module):
        def __init__(self, dim):
            super().__init__()

    with pytest.raises(AssertionError, match="OtherNorm"):
        make(Block, norm_cls=OtherNorm, fused_dropout_add_ln=True)
    with pytest.raises(AssertionError, match="Identity"):
        make(Block, dropout_cls=lambda p: nn.Identity(), fused_dropout_add_ln=True)
    with pytest.raises(AssertionError, match="residual_in_fp32"):
        make(Block, prenorm=False, residual_in_fp32=True)
    with pytest.raises(AssertionError, match="prenorm=True"):
        make(Block, prenorm=False)(X, RESIDUAL)
    block = make(ParallelBlock, resid_dropout1=0.1, resid_dropout2=0.2, fused_dropout_add_ln=True).train()
    with pytest.raises(AssertionError, match="equal dropout"):
        block(X, X, RESIDUAL)


@pytest.mark.parametrize("cls", [Block, ParallelBlock])
def test_zero_centered_weights_in_either_form(cls):
    plain, fused = (
        make(cls, norm_cls=partial(RMSNorm, zero_centered_weight=True), fused_dropout_add_ln=is_fused)
        for is_fused in (False, True)
    )
    arguments = (X, RESIDUAL) if cls is Block else (X, X.flip(1), RESIDUAL)
    torch.testing.assert_close(fused(*arguments), plain(*arguments))


def test_fused_form_refuses_a_norm_with_dropout():
    with pytest.raises(AssertionError, match="dropout of its own"):
        make(Block, norm_cls=partial(RMSNorm, dropout_p=0.1), fused_dropout_add_ln=True)
