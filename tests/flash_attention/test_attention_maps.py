"""Attention maps are the weights that attention used, come in slices, and are collected and drawn."""

import sys

import pytest
import torch
from bhsd_oracle import OPTIONS, make
from torch import nn

from flash_attention import (
    FlashAttention,
    MultiHeadFlashAttention,
    attention_map,
    attention_rows,
    collect_attention_maps,
    flash_attention,
    maps,
    plot_attention_map,
)
from flash_attn_plus import InvalidArgument
from flash_attn_plus.testing import assert_close

KEEP = torch.tensor([[True] * 6 + [False] * 3, [False] * 2 + [True] * 7, [True, False, False] * 3])


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("sq", [9, 4, 12, 1])
@pytest.mark.parametrize("options", OPTIONS)
def test_weights_times_v_is_attention(options, sq, is_masked, device):
    x, keep = make(sq, 9, torch.float64, device), KEEP.to(device) if is_masked else None
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in OPTIONS[options].items()}
    weights = attention_map(x.q, x.k, keep, **options)
    out, lse = flash_attention(*x[:3], keep, return_lse=True, **options)
    torch.testing.assert_close(weights @ x.v.repeat_interleave(2, 1), out)
    torch.testing.assert_close(weights.sum(-1), lse.isfinite().double())
    assert weights.min() >= 0.0


@pytest.mark.parametrize(
    ("rows", "heads"), [(None, None), (-1, 2), (slice(2, None, 3), [3, 0]), ([8, 0, 0], slice(1, 3)), (range(2), -2)]
)
def test_selected_rows_and_heads(rows, heads, device):
    x, keep, options = make(9, 9, torch.float32, device), KEEP.to(device), {"causal": True, "softcap": 3.0}
    whole = attention_map(x.q, x.k, keep, **options).detach().cpu().numpy()
    picked = whole if heads is None else whole[:, [heads] if isinstance(heads, int) else heads]
    picked = picked if rows is None else picked[:, :, [rows] if isinstance(rows, int) else rows]
    found = attention_map(x.q, x.k, keep, rows=rows, heads=heads, **options)
    torch.testing.assert_close(found.detach().cpu(), torch.from_numpy(picked))


def test_slices(device):
    x = make(9, 9, torch.float32, device)
    found = list(attention_rows(x.q, x.k, rows=slice(1, None), block_rows=3))
    assert [numbers for numbers, _ in found] == [[1, 2, 3], [4, 5, 6], [7, 8]]
    torch.testing.assert_close(torch.cat([w for _, w in found], 2), attention_map(x.q, x.k)[:, :, 1:])


def test_a_long_sequence_is_never_held_whole(device, monkeypatch):
    """Slices stay below the budget, and rows that are not asked for are not computed."""
    seen = []
    monkeypatch.setattr(maps, "_BLOCK_NUMBERS", 10000)
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: seen.append(x.numel()) or softmax(x, dim))
    q, k = torch.randn(1, 2, 500, 8, device=device), torch.randn(1, 1, 3000, 8, device=device)
    assert attention_map(q, k, rows=slice(0, 10)).shape == (1, 2, 10, 3000)
    assert max(seen) <= 10000
    assert sum(seen) == 2 * 10 * 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype, device):
    x = make(9, 9, dtype, device)
    found = attention_map(x.q, x.k)
    assert found.dtype == torch.float32
    scores = x.q.float() @ x.k.float().repeat_interleave(2, 1).transpose(-1, -2) * 24**-0.5
    assert_close("map", found, attention_map(x.q.double(), x.k.double()), scores.softmax(-1))
    nothing = attention_map(x.q, x.k, rows=[])
    assert nothing.shape == (3, 4, 0, 9)
    assert nothing.dtype == torch.float32


@pytest.mark.parametrize("kind", ["list", "nested"])
def test_sequences_of_different_lengths(kind, device):
    x, slopes = make(9, 9, torch.float32, device), torch.rand(3, 4, device=device)
    q, k = ([t[n, :, :length] for n, length in enumerate((4, 9, 1))] for t in (x.q, x.k))
    given = (q, k)
    if kind == "nested":
        given = tuple(
            torch.nested.as_nested_tensor([s.transpose(0, 1) for s in t], layout=torch.jagged).transpose(1, 2)
            for t in given
        )
    found = attention_map(*given, causal=True, alibi_slopes=slopes, rows=-1)
    for n, weights in enumerate(found):
        alone = attention_map(q[n][None], k[n][None], causal=True, alibi_slopes=slopes[n], rows=-1)[0]
        torch.testing.assert_close(weights, alone)


class Model(nn.Module):
    """Two layers, the first one called twice."""

    def __init__(self):
        super().__init__()
        self.first = MultiHeadFlashAttention(16, 4, 2, causal=True, rotary_dim=4)
        self.second = MultiHeadFlashAttention(16, 2, dropout=0.5)
        self.bare = FlashAttention()

    def forward(self, x, keep):
        x = self.second(self.first(self.first(x, key_padding_mask=keep)), x, key_padding_mask=keep)
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
        return self.bare(q=heads, k=heads, v=heads)


def test_collected_by_layer(device):
    torch.manual_seed(0)
    model, x, keep = Model().to(device), torch.randn(3, 9, 16, device=device), KEEP.to(device)
    with collect_attention_maps(model, rows=slice(2, 5), heads=[0, 1]) as found:
        model(x, keep)
    assert {name: [tuple(w.shape) for w in w_all] for name, w_all in found.items()} == {
        "first.attention": [(3, 2, 3, 9)] * 2,
        "second.attention": [(3, 2, 3, 9)],
        "bare": [(3, 2, 3, 9)],
    }
    first = found["first.attention"][0]
    assert first.device.type == "cpu"
    assert not first.requires_grad
    assert not first[0].triu(3).any()  # causal: query 2 sees keys 0 to 2
    assert not found["second.attention"][0].masked_select(~KEEP[:, None, None]).any()
    model(x, keep)
    assert len(found["bare"]) == 1


def test_collected_from_sequences(device):
    module, items = MultiHeadFlashAttention(16, 2, device=device), [torch.randn(n, 16, device=device) for n in (3, 5)]
    with torch.inference_mode(), collect_attention_maps(module) as found:
        module(items)
        module(items[1][None])
    together, alone = found["attention"]
    assert [tuple(w.shape) for w in together] == [(2, 3, 3), (2, 5, 5)]
    torch.testing.assert_close(together[1], alone[0])


def test_drawn(tmp_path, device):
    pytest.importorskip("matplotlib")
    x = make(9, 9, torch.bfloat16, device)
    weights = attention_map(x.q, x.k, causal=True)[0]
    figure = plot_attention_map(weights, columns=3)
    titled = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in titled] == ["head 0", "head 1", "head 2", "head 3"]
    for ax, head in zip(titled, weights, strict=True):
        torch.testing.assert_close(torch.from_numpy(ax.images[0].get_array().data).float(), head.detach().cpu())
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert [ax.get_title() for ax in plot_attention_map(weights[0], ["one"]).axes] == ["one", ""]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"flash-attention-plus\[plot\]"):
        plot_attention_map(torch.ones(2, 3, 3))


Q = torch.zeros(2, 4, 9, 8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attention_map(Q[0], Q), "q must have shape"),
        (lambda: attention_map(Q, Q, window_size=(1,)), "window_size must be a pair"),
        (lambda: attention_map(list(Q), list(Q), torch.ones(2, 9, dtype=torch.bool)), "hold no padding"),
        (lambda: attention_map(list(Q), Q), "k must hold 2 sequences like q"),
        (lambda: attention_map(list(Q), [Q[0]]), "k must hold 2 sequences like q"),
        (lambda: attention_map(Q, Q, rows=9), "rows must select from the 9"),
        (lambda: attention_map(Q, Q, heads=[-5]), "heads must select from the 4"),
        (lambda: attention_map(Q, Q, torch.ones(2, 9)), "key_padding_mask must be bool"),
        (lambda: plot_attention_map(Q), "weights must have shape"),
        (lambda: plot_attention_map(Q[0], ["one"]), "labels must name each of the 4"),
        (lambda: collect_attention_maps(nn.Linear(2, 2)).__enter__(), "no FlashAttention"),
    ],
)
def test_refusals_name_the_argument(call, words):
    with pytest.raises(InvalidArgument, match=words):
        call()
