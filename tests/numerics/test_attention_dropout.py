"""The dropout bits, and that every backend applies just these."""

import pytest
import torch
from cases import dense, varlen
from serving import BACKENDS, served

from flash_attn_plus import attention, use_backend
from flash_attn_plus.dropout import keep_mask, keep_threshold, philox
from flash_attn_plus.testing import make_inputs, run_engine


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, words, device):
    """The known answers of Salmon et al.'s Random123 for philox4x32 with 7 rounds."""
    numbers = philox(*(tuple(torch.tensor(x, device=device) for x in xs) for xs in (counter, key)))
    assert " ".join(f"{int(x):08x}" for x in numbers) == words


def test_bits_depend_on_coordinates_alone(device):
    state, heads = torch.tensor([2**61 + 12345, 77], device=device), torch.arange(6, device=device).view(2, 3)
    whole = keep_mask(state, heads, range(40), range(203), 0.17)
    assert whole.shape == (2, 3, 40, 203)
    assert torch.equal(
        keep_mask(state, heads[1:, 2:], range(11, 30), range(13, 150), 0.17), whole[1:, 2:, 11:30, 13:150]
    )


def test_bits_differ_by_every_coordinate_and_by_both_numbers_of_the_state(device):
    def bits(seed=5, offset=7, head=0, row=0, col=0):
        state = torch.tensor([seed, offset], device=device)
        return keep_mask(state, torch.tensor([head], device=device), range(row, row + 64), range(col, col + 64), 0.5)

    sound = bits()
    for other in (bits(seed=6), bits(seed=5 + 2**33), bits(offset=8), bits(head=1), bits(row=64), bits(col=64)):
        assert 0.4 < (sound ^ other).float().mean().item() < 0.6


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.17, 0.5, 0.9, 0.9999999])
def test_fraction_dropped(p, device):
    keep = keep_mask(torch.tensor([3, 4], device=device), torch.arange(4, device=device), range(256), range(256), p)
    assert abs((~keep).float().mean().item() - min(p, 1 - 2**-16)) < 0.005
    assert 1 <= keep_threshold(p) <= 65536
    assert p > 0.0 or keep.all()


@served(lambda size: {"dropout_causal": dense(size)["dropout_causal"]}, (torch.float32,))
def test_seed_decides_the_result(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    q, k, v = (x.clone().requires_grad_() for x in call.inputs[:3])

    def run(seed):
        torch.manual_seed(seed)
        out = attention(q, k, v, causal=True, dropout_p=0.3)
        return out, *torch.autograd.grad(out, (q, k, v), call.dout)

    with use_backend(backend):
        first, again, other = run(1), run(1), run(2)
        following = attention(q, k, v, causal=True, dropout_p=0.3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(other[0], following)


@served(lambda size: {"dropout": dense(size)["dropout"]}, (torch.float32,))
def test_lse_is_that_of_the_scores_before_dropout(backend, case, dtype, device):
    call = make_inputs(case, dtype, device)
    with use_backend(backend):
        dropped = run_engine(call, with_gradients=False)["lse"]
        kept = run_engine(call._replace(inputs=call.inputs._replace(dropout_p=0.0)), with_gradients=False)["lse"]
    torch.testing.assert_close(dropped, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dropout_causal", "varlen_dropout"])
def test_weights_of_one_hot_values_show_the_bits(backend, name, device):
    """With v the identity, out holds the weights themselves: zero exactly where a bit drops a visible key."""
    case = (dense("small") | varlen("small"))[name]._replace(right=-1, head_dim_v=45, heads=2, heads_k=2)
    if case.lengths_k is not None:
        case = case._replace(lengths_q=(19, 7), lengths_k=(45, 45))
    call = make_inputs(case, torch.float32, device)
    identity = torch.eye(45, device=device)[:, None].expand(45, 2, 45)
    v = torch.cat([identity] * 2) if case.lengths_k is not None else torch.stack([identity] * 2)
    with use_backend(backend):
        out = run_engine(call._replace(inputs=call.inputs._replace(v=v)), with_gradients=False)["out"]
    for n in range(2):
        rows = 19 if case.lengths_q is None else case.lengths_q[n]
        weights = out[n] if case.lengths_q is None else out[19 * n : 19 * n + rows]
        heads = 2 * n + torch.arange(2, device=device)
        keep = keep_mask(call.inputs.rng_state, heads, range(rows), range(45), case.dropout_p)
        assert torch.equal(weights != 0, keep.transpose(0, 1))
