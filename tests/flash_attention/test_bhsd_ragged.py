"""Lists and nested tensors go in and come back in order, and cost no padding."""

import pytest
import torch
from bhsd_oracle import OPTIONS, Sample, assert_right, make, one_sequence
from torch.nested import nested_tensor, nested_tensor_from_jagged

from flash_attention import FlashAttention, MultiHeadFlashAttention, flash_attention
from flash_attn_plus import InvalidArgument

LENGTHS_Q, LENGTHS_K = (15, 0, 29), (23, 3, 18)


def parts(x: torch.Tensor, lengths) -> list[torch.Tensor]:
    return [item[:, :length] for item, length in zip(x, lengths, strict=True)]


def oracle(x: Sample, options: dict):
    """Concatenated out and lse of each sequence alone."""

    def function(is_exact):
        tensors = zip(parts(x.q, LENGTHS_Q), parts(x.k, LENGTHS_K), parts(x.v, LENGTHS_K), strict=True)
        pairs = [one_sequence(*t, n, is_exact, **options) for n, t in enumerate(tensors)]
        return tuple(torch.cat(p, 1) for p in zip(*pairs, strict=True))

    return function


def sample(dtype: torch.dtype, device: str) -> Sample:
    x, total = make(29, 23, dtype, device), sum(LENGTHS_Q)
    return x._replace(dout=x.dout.flatten(0, 1)[:4].repeat(1, 2, 1)[:, :total], dlse=x.dlse[0].repeat(1, 2)[:, :total])


@pytest.mark.parametrize("options", OPTIONS)
def test_lists(options, device):
    dtype = (torch.bfloat16, torch.float16, torch.float32)[list(OPTIONS).index(options) % 3]
    x, options = sample(dtype, device), OPTIONS[options]
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    tensors = parts(x.q, LENGTHS_Q), tuple(parts(x.k, LENGTHS_K)), parts(x.v, LENGTHS_K)
    out, lse = flash_attention(*tensors, return_lse=True, **options)
    assert [o.shape for o in out] == [(4, n, 16) for n in LENGTHS_Q]
    assert [o.shape for o in lse] == [(4, n) for n in LENGTHS_Q]
    assert_right((torch.cat(out, 1), torch.cat(lse, 1)), x, oracle(x, options))


def offsets_of(lengths, device: str) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device)


def jagged(x: torch.Tensor, lengths, offsets: torch.Tensor) -> torch.Tensor:
    """(b, h, *, d), the transpose of a nested (b, *, h, d) whose rows are those of x."""
    rows = torch.cat([item.transpose(0, 1) for item in parts(x, lengths)])
    return nested_tensor_from_jagged(rows, offsets).transpose(1, 2)


@pytest.mark.parametrize("options", ["full", "causal"])
def test_nested(options, device):
    x, options = sample(torch.float32, device), OPTIONS[options]
    offsets = offsets_of(LENGTHS_K, device)
    q = jagged(x.q, LENGTHS_Q, offsets_of(LENGTHS_Q, device))
    k, v = (jagged(t, LENGTHS_K, offsets) for t in (x.k, x.v))
    out, lse = FlashAttention(**options)(q, k, v, return_lse=True)
    assert out.is_nested
    assert out.shape[2] == q.shape[2]  # the same jagged dimension, so that results and inputs can be added
    assert_right((out.values(), lse.values()), x, oracle(x, options))


def test_only_real_tokens_are_computed(device):
    """The engine is given as many rows as there are tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    module = MultiHeadFlashAttention(16, 2, device=device)
    items = [torch.randn(n, 16, device=device) for n in (3, 50, 1)]
    with FlopCounterMode(display=False) as counter:
        module(items)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.addmm] == 4 * 2 * 54 * 16 * 16


@pytest.mark.parametrize("has_context", [False, True])
@pytest.mark.parametrize("kind", ["list", "nested"])
def test_multihead(kind, has_context, device):
    torch.manual_seed(0)
    options = {} if has_context else {"causal": True, "rotary_dim": 4}
    module = MultiHeadFlashAttention(32, 4, 2, device=device, dtype=torch.float64, **options)
    items = [torch.randn(n, 32, device=device, dtype=torch.float64, requires_grad=True) for n in (4, 1, 7)]
    context = [torch.randn(n, 32, device=device, dtype=torch.float64) for n in (2, 5, 3)] if has_context else None
    alone = [module(x[None], None if context is None else context[n][None])[0] for n, x in enumerate(items)]
    arguments = [items, context]
    if kind == "nested":
        arguments = [None if x is None else torch.nested.as_nested_tensor(x, layout=torch.jagged) for x in arguments]
    out = module(*arguments)
    together = list(out.unbind()) if kind == "nested" else out
    torch.testing.assert_close(together, alone)
    total, expected = sum(o.square().sum() for o in together), sum(o.square().sum() for o in alone)
    torch.testing.assert_close(torch.autograd.grad(total, items), torch.autograd.grad(expected, items))


def test_refusals_name_the_argument(device):
    x = [torch.randn(2, n, 8, device=device) for n in (3, 5)]
    with pytest.raises(InvalidArgument, match="layout=torch"):
        flash_attention(*[nested_tensor(x, layout=torch.strided)] * 3)
    rows = nested_tensor([t.transpose(0, 1).contiguous() for t in x], layout=torch.jagged)
    with pytest.raises(InvalidArgument, match="whose dimension 2 is the length"):
        flash_attention(rows, rows, rows)
    narrowed = torch.nested.narrow(
        torch.randn(2, 9, 2, 8, device=device), 1, *torch.tensor([[0, 1], [3, 5]], device=device), layout=torch.jagged
    ).transpose(1, 2)
    with pytest.raises(InvalidArgument, match="without gaps"):
        flash_attention(narrowed, narrowed, narrowed)
    q, other = (
        rows.transpose(1, 2),
        nested_tensor([t.transpose(0, 1).contiguous() for t in x[::-1]], layout=torch.jagged),
    )
    with pytest.raises(InvalidArgument, match="same lengths as k"):  # and the same number of tokens
        flash_attention(q, q, other.transpose(1, 2))
    with pytest.raises(InvalidArgument, match="same lengths as k"):
        flash_attention(x, x, x[::-1])
