"""Generation token by token, and piece by piece, gives what one call over the whole sequences gives."""

import pytest
import torch
from torch import nn

from flash_attention import MultiHeadFlashAttention
from flash_attn_plus import InvalidArgument
from flash_attn_plus.testing import assert_close

OPTIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "softcap": 3.0, "softmax_scale": 0.4},
    "rotary": {"num_kv_heads": 1, "rotary_dim": 8},
    "window": {"window_size": (4, 0), "rotary_dim": 4, "rotary_interleaved": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
}
LENGTHS = (12, 7, 9)


def make(**options) -> MultiHeadFlashAttention:
    torch.manual_seed(0)
    return MultiHeadFlashAttention(32, 4, causal=True, dtype=torch.float64, **options).eval()


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    """Sequences of different lengths."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(n, 32, dtype=torch.float64, generator=random) for n in LENGTHS]


@pytest.mark.parametrize("pieces", [(1,) * 7, (5, 2), (7,), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_pieces_equal_the_whole(options, pieces, tokens):
    module, x = make(**OPTIONS[options]), torch.stack([t[:7] for t in tokens])
    with torch.inference_mode():
        cache = module.make_cache(3, 7)
        found = torch.cat([module(piece, cache=cache) for piece in x.split(pieces, 1)], 1)
        torch.testing.assert_close(found, module(x))
    assert cache.lengths.tolist() == [7] * 3


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("options", OPTIONS)
def test_prompts_of_different_lengths(options, side, tokens):
    """A padded prompt, then tokens one by one: as each sequence alone, wherever the padding is."""
    module, prompts = make(**OPTIONS[options]), [t[:-2] for t in tokens]
    longest = max(map(len, prompts))
    x, keep = torch.full((3, longest, 32), 1e3, dtype=torch.float64), torch.zeros(3, longest, dtype=torch.bool)
    for n, prompt in enumerate(prompts):
        places = {
            "left": range(longest - len(prompt), longest),
            "right": range(len(prompt)),
            "holes": sorted(
                torch.randperm(longest, generator=torch.Generator().manual_seed(n))[: len(prompt)].tolist()
            ),
        }[side]
        x[n, list(places)], keep[n, list(places)] = prompt, True
    with torch.no_grad():
        cache = module.make_cache(3, longest + 2)
        out = module(x, key_padding_mask=keep, cache=cache)
        assert cache.lengths.tolist() == [n - 2 for n in LENGTHS]
        steps = [module(torch.stack([t[-2:][step : step + 1] for t in tokens]), cache=cache) for step in (0, 1)]
        for n, t in enumerate(tokens):
            alone = module(t[None])[0]
            torch.testing.assert_close(torch.cat((out[n, keep[n]], *(s[n] for s in steps))), alone)
            torch.testing.assert_close(out[n, ~keep[n]], module.out_proj.bias.expand(longest - len(prompts[n]), -1))


def test_a_sequence_that_has_ended_adds_nothing(tokens):
    module, x = make(rotary_dim=8), torch.stack([t[:5] for t in tokens])
    with torch.no_grad():
        cache = module.make_cache(3, 7)
        module(x[:, :3], cache=cache)
        before = cache.k[1, :3].clone()
        module(x[:, 3:4], key_padding_mask=torch.tensor([[True], [False], [True]]), cache=cache)
        assert cache.lengths.tolist() == [4, 3, 4]
        assert torch.equal(cache.k[1, :3], before)
        out = module(x[:, 4:], cache=cache)
        expected = module(torch.cat((x[1, :3], x[1, 4:]))[None])[0, -1:]
    torch.testing.assert_close(out[1], expected)


def test_beam_search_reorders_the_cache(tokens):
    module, x = make(rotary_dim=8), torch.stack([t[:5] for t in tokens])
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = module.make_cache(3, 5)
        module(x[:, :4], cache=cache)
        cache.reorder(order)
        out = module(x[:, 4:], cache=cache)
        torch.testing.assert_close(out, module(torch.cat((x[order, :4], x[:, 4:]), 1))[:, -1:])
        cache.reset()
        torch.testing.assert_close(module(x, cache=cache), module(x))


def test_under_autocast(device):
    module = MultiHeadFlashAttention(32, 4, causal=True, rotary_dim=8).to(device)
    x = torch.randn(2, 6, 32, device=device)
    with torch.no_grad():
        with torch.autocast(device, torch.bfloat16):
            cache = module.make_cache(2, 6)
            found = torch.cat([module(x[:, :4], cache=cache), module(x[:, 4:], cache=cache)], 1)
            whole = module(x)
        assert cache.k.dtype == found.dtype == torch.bfloat16
        assert_close("out", found, module.double()(x.double()), whole)


def test_a_cache_of_less_precision(tokens):
    module, x = make(), torch.stack([t[:5] for t in tokens])
    with torch.no_grad():
        cache = module.make_cache(3, 5, dtype=torch.bfloat16)
        out = module(x, cache=cache)
        exact = module(x)
        assert cache.k.dtype == torch.bfloat16
        assert out.dtype == torch.float64
        assert not torch.equal(out, exact)
        assert_close("out", out, exact, module.to(torch.bfloat16)(x.to(torch.bfloat16)))


def refused(words: str, *args, module: nn.Module | None = None, **kwargs) -> None:
    with pytest.raises(InvalidArgument, match=words):
        (make() if module is None else module)(*args, **kwargs)


def test_refusals_name_the_argument():
    x, module = torch.randn(2, 3, 32, dtype=torch.float64), make()
    cache = module.make_cache(2, 4)
    refused("cache has no backward", x, cache=cache)
    with torch.no_grad():
        refused("causal=True", x, cache=cache, module=MultiHeadFlashAttention(32, 4))
        refused("self-attention", x, x, cache=cache)
        refused("self-attention", list(x), cache=cache)
        refused("cache holds 2 sequences, not 3", x[[0, 1, 1]], cache=cache)
        refused("key_padding_mask must be bool", x, key_padding_mask=torch.ones(2, 3), cache=cache)
        module(x, cache=cache)
        refused("room for 4 tokens a sequence, not for 3 behind the 3", x, cache=cache)
    assert cache.lengths.tolist() == [3, 3]


def test_dropout_and_a_cache_do_not_go_together(tokens):
    module = make(dropout=0.1).train()
    with torch.no_grad(), pytest.raises(InvalidArgument, match="cache has no dropout"):
        module(tokens[0][None], cache=module.make_cache(1, 12))
