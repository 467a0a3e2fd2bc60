"""`flash_attention` on dense tensors and key padding masks, against the oracle, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from bhsd_oracle import OPTIONS, assert_right, make, one_sequence, without_padding
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attention import flash_attention
from flash_attn_plus import InvalidArgument
from flash_attn_plus.testing import assert_close

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MASKS = {
    "padded": ("1111100000", "0000011111", "1011010011"),
    "edges": ("0000000000", "1111111111", "0001000000"),
}
LENGTHS = {"self": (30, 30), "short": (12, 30), "tall": (39, 30), "one": (1, 30)}


def mask_of(name: str, device: str) -> torch.Tensor:
    bits = torch.tensor([[bit == "1" for bit in row] for row in MASKS[name]], device=device)
    return bits.repeat_interleave(3, 1)


def on(device: str, options: dict) -> dict:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("options", OPTIONS)
def test_dense(options, device):
    dtype = FLOATS[list(OPTIONS).index(options) % 3]
    x, options = make(29, 44, dtype, device), on(device, OPTIONS[options])
    out, lse = flash_attention(*x[:3], return_lse=True, **options)
    assert out.dtype == dtype
    assert torch.equal(flash_attention(*x[:3], **options), out)

    def oracle(is_exact):
        pairs = [one_sequence(x.q[n], x.k[n], x.v[n], n, is_exact, **options) for n in range(3)]
        return tuple(torch.stack(parts) for parts in zip(*pairs, strict=True))

    assert_right((out, lse), x, oracle)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_key_padding_mask(options, mask, lengths, device):
    number = list(OPTIONS).index(options) + list(LENGTHS).index(lengths)
    dtype, heads_k = FLOATS[number % 3], (1, 2, 4)[number // 3 % 3]
    x, keep, options = make(*LENGTHS[lengths], dtype, device, heads_k=heads_k), mask_of(mask, device), OPTIONS[options]
    if lengths == "one" and options.keys() == {"causal"}:
        options = {}  # the last query sees every key, whether its own is padding or not
    pair = flash_attention(*x[:3], keep, return_lse=True, **on(device, options))
    assert_right(pair, x, lambda is_exact: without_padding(*x[:3], keep, is_exact, **on(device, options)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_hides_keys_where_they_stand(causal, mask, device):
    """Against PyTorch's attention with a mask of every score, in float64; queries that are padding are left out."""
    x, keep = make(30, 30, torch.float64, device, heads_k=4), mask_of(mask, device)
    shown = keep[:, None, None, :].expand(3, 1, 30, 30)
    if causal:
        shown = shown & torch.ones(30, 30, dtype=torch.bool, device=device).tril()
    expected = F.scaled_dot_product_attention(*x[:3], attn_mask=shown).where(shown.any(-1, keepdim=True), 0.0)
    if causal:
        expected = expected * keep[:, None, :, None]
    out = flash_attention(*x[:3], keep, causal=causal)
    torch.testing.assert_close(out, expected)
    dout = x.dout * shown.any(-1, keepdim=True)  # PyTorch's own gradient of a row without keys is NaN
    torch.testing.assert_close(torch.autograd.grad(out, x[:3], dout), torch.autograd.grad(expected, x[:3], dout))


def test_what_padding_holds_does_not_matter(device):
    x, keep = make(30, 30, torch.float32, device), mask_of("padded", device)
    expected = flash_attention(*x[:3], keep, causal=True)
    padding = ~keep[:, None, :, None]
    poisoned = [t.detach().masked_fill(padding, 1e30).requires_grad_() for t in x[:3]]
    out = flash_attention(*poisoned, keep, causal=True)
    assert torch.equal(out, expected)
    for gradient in torch.autograd.grad(out, poisoned, torch.ones_like(out)):
        assert not gradient.masked_select(padding).any()


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_is_not_read_on_the_host(causal):
    """A fake tensor has no contents, so reading one raises."""
    with FakeTensorMode():
        q, k, v = (torch.empty(3, 4, 10, 24, requires_grad=True) for _ in range(3))
        out = flash_attention(q, k, v, torch.empty(3, 10, dtype=torch.bool), causal=causal)
        out.sum().backward()
    assert out.shape == q.grad.shape == (3, 4, 10, 24)


def test_float32_of_randn_is_accurate(device):
    q, k, v = (torch.randn(2, 4, 200, 64, generator=torch.Generator().manual_seed(n)).to(device) for n in range(3))
    plain = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_close("out", flash_attention(q, k, v), exact, plain)


@pytest.mark.parametrize("shape", [(3, 4, 0, 24), (3, 4, 10, 24)])
def test_without_keys_or_queries(shape, device):
    q = torch.randn(shape, device=device, requires_grad=True)
    k, v = (torch.randn(3, 2, 10 if shape[2] == 0 else 0, 24, device=device, requires_grad=True) for _ in range(2))
    for mask in (None, torch.ones(3, k.shape[2], dtype=torch.bool, device=device)):
        for causal in (False, True):
            out, lse = flash_attention(q, k, v, mask, causal=causal, return_lse=True)
            assert out.shape == shape
            assert not out.any()
            assert bool((lse == float("inf")).all())
            assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_dropout_with_a_mask_keeps_the_mean(device):
    q, k = (torch.zeros(1, 1, n, 8, device=device) for n in (2000, 30))
    v, keep = torch.ones(1, 1, 30, 8, device=device), mask_of("padded", device)[2:]
    torch.manual_seed(0)
    out = flash_attention(q, k, v, keep, dropout_p=0.5)
    assert out.std() > 0.1
    torch.testing.assert_close(out.mean().item(), 1.0, rtol=0.03, atol=0.0)


Q = torch.zeros(3, 4, 10, 24)
KV = torch.zeros(3, 2, 10, 24)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((Q[0], KV, KV), {}, "q must have shape"),
        ((Q, KV[:, :, :, :8], KV), {}, "k must have shape"),
        ((Q, Q[:, :3], Q[:, :3]), {}, "divisor of its 4 heads"),
        ((Q, KV, KV[:, :, :5]), {}, "v must have k's"),
        ((Q, KV, KV, torch.ones(3, 10)), {}, "key_padding_mask must be bool"),
        ((Q, KV, KV, torch.ones(3, 9, dtype=torch.bool)), {}, "key_padding_mask must have shape"),
        ((Q, KV, KV), {"dropout_p": 1.0}, "p_dropout"),
        ((Q, KV, KV), {"window_size": (1,)}, "window_size must be a pair"),
        ((Q, KV, KV), {"window_size": (1.5, 0)}, "window_size must be a pair"),
        ((Q, KV, KV), {"alibi_slopes": torch.ones(3)}, "alibi_slopes must have shape"),
        ((Q, [KV[0]], KV), {}, "k must be a tensor like q"),
        (([Q[0]], KV, KV), {}, "lists or nested tensors like q"),
        (([Q[0]], [KV[0]], [KV[0]], torch.ones(1, 10, dtype=torch.bool)), {}, "hold no padding"),
        (([], [], []), {}, "q must hold at least one tensor"),
        (([Q[0], Q[1, :, :, :8]], [KV[0]] * 2, [KV[0]] * 2), {}, "sequences of q must agree"),
        (([Q[0]] * 2, [KV[0]], [KV[0]]), {}, "equally many sequences"),
        (([Q[0]], [KV[0]], [KV[0, :, :4]]), {}, "same lengths as k"),
    ],
)
def test_refusals_name_the_argument(arguments, options, words):
    with pytest.raises(InvalidArgument, match=words):
        flash_attention(*arguments, **options)
