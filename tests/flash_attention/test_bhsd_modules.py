"""The modules: equality with PyTorch's, rotary positions, options that must survive conversions, refusals."""

import pytest
import torch
from torch import nn

from flash_attention import FlashAttention, MultiHeadFlashAttention, flash_attention
from flash_attn_plus import InvalidArgument

KEEP = torch.tensor([[True] * 6 + [False] * 3, [False] * 2 + [True] * 7, [True, False, True] * 3])
FEATURES = torch.randn(3, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(3, 7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
KINDS = {
    "self": {},
    "no-bias": {"bias": False},
    "masked": {},
    "causal": {},
    "causal-masked": {},
    "cross": {},
    "cross-masked": {},
    "cross-other-width": {"kdim": 20, "vdim": 20},
}


def torch_module(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():  # biases start at zero
            parameter.normal_(std=0.3)
    return module


def call_torch(module, kind: str, x, context, keep):
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1) if "causal" in kind else None
    source = context if "cross" in kind else x
    return module(x, source, source, key_padding_mask=keep, attn_mask=causal, need_weights=False)[0]


def call_ours(module, kind: str, x, context, keep):
    mask = None if keep is None else ~keep
    return module(x, context if "cross" in kind else None, mask)


def inputs_of(kind: str):
    """x, context, PyTorch's mask (True where ignored), and which outputs count: not those of padding if causal."""
    context = CONTEXT if kind == "cross-other-width" else FEATURES[:, :7].flip(1)
    ignored = ~(KEEP[:, :7] if "cross" in kind else KEEP) if "masked" in kind else None
    counts = KEEP[..., None].double() if kind == "causal-masked" else torch.ones(1, dtype=torch.float64)
    return FEATURES.clone().requires_grad_(), context.clone().requires_grad_(), ignored, counts


def results(module, call, kind: str):
    """Output and gradients of the inputs and, by name, of the parameters."""
    x, context, ignored, counts = inputs_of(kind)
    out = call(module, kind, x, context, ignored)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = out.where(counts.bool(), 0.0)
    (out * weight).sum().backward()
    return out, x.grad, context.grad


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_multihead_attention(kind):
    theirs = torch_module(**KINDS[kind])
    ours = MultiHeadFlashAttention.from_torch(theirs, causal="causal" in kind)
    torch.testing.assert_close(results(ours, call_ours, kind), results(theirs, call_torch, kind))
    layers = ours.q_proj, ours.k_proj, ours.v_proj
    if theirs.in_proj_weight is not None:
        torch.testing.assert_close(torch.cat([x.weight.grad for x in layers]), theirs.in_proj_weight.grad)
    if theirs.in_proj_bias is not None:
        # a bias of the keys moves all scores of a query alike, so its gradient is rounding noise around 0
        torch.testing.assert_close(torch.cat([x.bias.grad for x in layers]), theirs.in_proj_bias.grad)
    torch.testing.assert_close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad)


@pytest.mark.parametrize("kind", ["self", "no-bias", "cross-other-width"])
@pytest.mark.parametrize("heads_k", [4, 2, 1])
def test_conversion_to_torch(heads_k, kind):
    torch.manual_seed(0)
    options = {"bias": kind != "no-bias", "d_context": KINDS[kind].get("kdim"), "dropout": 0.25}
    ours = MultiHeadFlashAttention(32, 4, heads_k, dtype=torch.float64, **options).eval()
    theirs = ours.to_torch()
    assert not theirs.training
    assert theirs.dropout == 0.25
    torch.testing.assert_close(results(theirs, call_torch, kind), results(ours, call_ours, kind))
    if heads_k == 4:
        again = MultiHeadFlashAttention.from_torch(theirs)
        assert all(torch.equal(x, ours.state_dict()[name]) for name, x in again.state_dict().items())
        assert again.attention.dropout == 0.25


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rotary_dim": 4}, "rotary_dim"),
        ({"window_size": (3, 3)}, "window_size"),
        ({"softcap": 2.0}, "softcap"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
        ({"softmax_scale": 0.5}, "softmax_scale"),
    ],
)
def test_what_torch_cannot_do_is_refused(options, word):
    with pytest.raises(InvalidArgument, match=f"{word} is set"):
        MultiHeadFlashAttention(32, 4, **options).to_torch()


@pytest.mark.parametrize(
    ("options", "word"),
    [({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn"), ({"kdim": 8}, "kdim 8")],
)
def test_what_we_cannot_do_is_refused(options, word):
    with pytest.raises(InvalidArgument, match=word):
        MultiHeadFlashAttention.from_torch(nn.MultiheadAttention(32, 4, **options))


def turned(x, positions, base: float, is_interleaved: bool, rotary_dim: int):
    """x (b, s, h, d) by the formula, with complex numbers."""
    angles = positions[..., None] * base ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    pairs = x[..., :rotary_dim]
    first, second = (pairs[..., ::2], pairs[..., 1::2]) if is_interleaved else pairs.chunk(2, -1)
    result = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    parts = result.real, result.imag
    together = torch.stack(parts, -1).flatten(-2) if is_interleaved else torch.cat(parts, -1)
    return torch.cat((together, x[..., rotary_dim:]), -1)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_rotary(is_masked, is_interleaved):
    torch.manual_seed(0)
    options = {"rotary_dim": 6, "rotary_base": 100.0, "rotary_interleaved": is_interleaved}
    module = MultiHeadFlashAttention(32, 4, 2, causal=True, dtype=torch.float64, **options)
    keep = KEEP if is_masked else torch.ones_like(KEEP)
    positions = (keep.cumsum(1) - 1).double()
    x = FEATURES.clone().requires_grad_()
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (module.q_proj, module.k_proj, module.v_proj))
    q, k = (turned(t, positions, 100.0, is_interleaved, 6) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    inner = flash_attention(q, k, v, keep, causal=True).transpose(1, 2).flatten(2)
    expected = module.out_proj(inner)
    out = module(x, key_padding_mask=KEEP if is_masked else None)
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(y.square().sum(), (x, *module.parameters())) for y in (out, expected)]
    torch.testing.assert_close(*gradients)


def test_dropout_is_for_training_only(device):
    q, k, v = (torch.randn(1, 2, 20, 8, device=device) for _ in range(3))
    module = FlashAttention(dropout=0.5)
    expected = flash_attention(q, k, v)
    assert not torch.allclose(module(q, k, v), expected)
    assert torch.equal(module.eval()(q, k, v), expected)


def test_alibi_slopes_stay_exact(device):
    slopes = torch.tensor([0.1, 0.3])
    module = FlashAttention(alibi_slopes=slopes).to(torch.bfloat16).to(device)
    assert torch.equal(module.alibi_slopes.cpu(), slopes)
    assert torch.equal(module.to_empty(device=device).alibi_slopes.cpu(), slopes)
    q, k, v = (torch.randn(1, 2, 20, 8, device=device, dtype=torch.bfloat16) for _ in range(3))
    assert torch.equal(module(q, k, v), flash_attention(q, k, v, alibi_slopes=slopes.to(device)))


def test_state_dict_round_trip():
    options = {"num_kv_heads": 2, "rotary_dim": 4, "alibi_slopes": torch.ones(4)}
    first, second = (MultiHeadFlashAttention(32, 4, **options).double() for _ in range(2))
    assert not torch.equal(first(FEATURES), second(FEATURES))
    assert set(first.state_dict()) == {f"{n}_proj.{p}" for n in ("q", "k", "v", "out") for p in ("weight", "bias")}
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(FEATURES), second(FEATURES))


def test_made_on_the_meta_device():
    options = {"causal": True, "rotary_dim": 8, "dtype": torch.float64}
    source = MultiHeadFlashAttention(32, 4, **options)
    module = MultiHeadFlashAttention(32, 4, **options, device="meta").to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    assert torch.equal(module(FEATURES), source(FEATURES))


def test_what_is_printed():
    shown = repr(FlashAttention(causal=True, window_size=(5, 0), alibi_slopes=torch.ones(3), dropout=0.1))
    assert shown == "FlashAttention(causal=True, window_size=(5, 0), alibi_slopes=(3,), dropout=0.1)"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlashAttention(dropout=1.0), "dropout must be in"),
        (lambda: FlashAttention(window_size=(1, 2, 3)), "window_size must be a pair"),
        (lambda: MultiHeadFlashAttention(30, 4), "num_heads must be a divisor"),
        (lambda: MultiHeadFlashAttention(32, 4, 3), "num_kv_heads must be a divisor"),
        (lambda: MultiHeadFlashAttention(32, 4, rotary_dim=3), "rotary_dim must be even"),
        (lambda: MultiHeadFlashAttention(32, 4, rotary_dim=10), "at most the head dim 8"),
        (lambda: MultiHeadFlashAttention(512, 1, rotary_dim=8), "rotary_dim must be 0 for head dims above 256"),
        (lambda: MultiHeadFlashAttention(16, 4)(FEATURES), "x must have shape"),
        (lambda: MultiHeadFlashAttention(32, 4).double()(FEATURES, CONTEXT), "context must have shape"),
        (lambda: MultiHeadFlashAttention(32, 4, rotary_dim=2)(FEATURES, FEATURES), "rotary_dim=0"),
        (lambda: MultiHeadFlashAttention(32, 4)(FEATURES, [FEATURES[0]]), "exactly when x is one"),
        (lambda: MultiHeadFlashAttention(32, 4).double()(FEATURES, None, KEEP[:, :4]), "key_padding_mask must have"),
    ],
)
def test_refusals_name_the_argument(make, words):
    with pytest.raises(InvalidArgument, match=words):
        make()
