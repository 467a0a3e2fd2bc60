"""S_dmask: shape, sign, and the scaling that readers undo with `_get_block_size_n`."""

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_interface as interface

from flash_attn_plus.dropout import keep_mask
from flash_attn_plus.reference import visible
from flash_attn_plus.testing import Case

BASE = Case(batch=2, seqlen_q=140, seqlen_k=163, heads=2, heads_k=1, head_dim=24, dropout_p=0.17)
CASES = {
    "full": BASE,
    "causal": BASE._replace(right=0),
    "window": BASE._replace(left=40, right=30),
    "alibi": BASE._replace(alibi="batch"),
    "head_dim_40": BASE._replace(head_dim=40, right=0),
    "head_dim_72": BASE._replace(head_dim=72),
    "head_dim_111": BASE._replace(head_dim=111),
    "head_dim_320": BASE._replace(head_dim=320, batch=1),
    "tall": BASE._replace(seqlen_q=163, seqlen_k=60, right=0),
}


def scores_of(call, n: int) -> torch.Tensor:
    """float64 (h, sq, sk) scores of sequence n, -inf where no key is visible."""
    x = call.inputs
    q, k = x.q.detach().double(), x.k.detach().double()
    if x.cu_seqlens_q is not None:
        (q_first, q_last), (k_first, k_last) = (cu[n : n + 2].tolist() for cu in (x.cu_seqlens_q, x.cu_seqlens_k))
        q, k = q[q_first:q_last], k[k_first:k_last]
    else:
        q, k = q[n], k[n]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * x.softmax_scale
    len_q, len_k = scores.shape[1:]
    if x.alibi_slopes is not None:
        rows = torch.arange(len_q, device=q.device)[:, None] + len_k - len_q
        slopes = x.alibi_slopes[n] if x.alibi_slopes.ndim == 2 else x.alibi_slopes
        scores -= slopes.double()[:, None, None] * (rows - torch.arange(len_k, device=q.device)).abs()
    return scores.masked_fill(~visible(len_q, len_k, call.left, call.right, q.device), float("-inf"))


def probabilities_of(dump, scores, lse, width: int) -> torch.Tensor:
    """Undo the scaling: every key block was divided by the row's maximum over it and the blocks to its right."""
    maxima = torch.stack([block.amax(-1) for block in scores.split(width, -1)], -1)
    running = maxima.flip(-1).cummax(-1).values.flip(-1)
    factors = (running - lse[..., None]).exp().nan_to_num(0.0)
    blocks = [b * factors[..., i, None] for i, b in enumerate(dump.split(width, -1))]
    return torch.cat(blocks, -1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_probabilities_and_dropped_entries(name, case, invoke, precise):
    made = invoke(name, case)
    x, call = made.call.inputs, made.call
    _, lse, dump = made(return_attn_probs=True)
    is_varlen = x.cu_seqlens_q is not None
    longest_q, longest_k = (call.max_seqlen_q, call.max_seqlen_k) if is_varlen else (x.q.shape[1], x.k.shape[1])
    sequences = 3 if is_varlen else x.q.shape[0]
    heads = x.q.shape[-2]
    assert dump.shape == (sequences, heads, -(-longest_q // 128) * 128, -(-longest_k // 128) * 128)
    width = interface._get_block_size_n(x.q.device, min(x.q.shape[-1], 256), True, call.right == 0)
    for n in range(sequences):
        scores = scores_of(call, n)
        inside = scores.isfinite()
        len_q, len_k = scores.shape[1:]
        rows = slice(*x.cu_seqlens_q[n : n + 2].tolist()) if is_varlen else None
        row_lse = (lse[:, rows] if is_varlen else lse[n]).detach().double()
        found = dump[n, :, :len_q, :len_k].detach().double()
        actual = probabilities_of(found.abs(), scores, row_lse, width)
        expected = (scores - row_lse[..., None]).exp()
        torch.testing.assert_close(actual[inside].to(precise), expected[inside].to(precise))
        assert found.abs().max() <= 1.0 + 1e-6
        batch_heads = n * heads + torch.arange(heads, device=x.q.device)
        is_kept = keep_mask(x.rng_state, batch_heads, range(len_q), range(len_k), x.dropout_p)
        assert torch.equal((found >= 0)[inside], is_kept[inside])


@pytest.mark.parametrize("dropout_p", [0.17, 0.5])
def test_dropped_fraction(dropout_p, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 256, 4, 32, device=device).bfloat16() for _ in range(3))
    _, _, dump = flash_attn.flash_attn_func(q, k, v, dropout_p, return_attn_probs=True)
    assert abs((dump < 0).float().mean().item() - dropout_p) < 0.01


def test_output_is_the_dumped_probabilities_times_values(invoke):
    made = invoke("flash_attn_func", BASE)
    x = made.call.inputs
    out, lse, dump = (t.detach() for t in made(return_attn_probs=True))
    width = interface._get_block_size_n(x.q.device, 24, True, False)
    for n in range(2):
        found = dump[n, :, :140, :163].double()
        kept = probabilities_of(found.clamp_min(0), scores_of(made.call, n), lse[n].double(), width)
        v = x.v[n].double().repeat_interleave(2, 1)
        expected = torch.einsum("hqk,khd->qhd", kept / (1 - 0.17), v)
        torch.testing.assert_close(out[n], expected.to(out.dtype))


def test_a_dropped_weight_that_underflows_keeps_its_sign(device):
    q = torch.zeros(1, 1, 1, 32, device=device, dtype=torch.float16)
    q[..., 0] = 8.0
    k = torch.zeros(1, 128, 1, 32, device=device, dtype=torch.float16)
    k[:, -1, :, 0] = 100.0  # every other weight is exp(-100 * 8 / sqrt(32)), zero in float16
    torch.manual_seed(0)
    _, _, dump = flash_attn.flash_attn_func(q, k, k, 0.5, return_attn_probs=True)
    assert 30 < (dump[0, 0, 0, :127] < 0).sum() < 98


@pytest.mark.parametrize("page_size", [0, 16])
def test_operator_with_partly_used_keys(page_size, device):
    """The dump of padded keys equals that of the same keys cut to length."""
    torch.manual_seed(0)
    q = torch.randn(10, 2, 16, device=device)
    k = torch.randn(2, 48, 2, 16, device=device)
    used, pad = torch.tensor([40, 21], dtype=torch.int32), torch.tensor([0 if page_size else 5, 0], dtype=torch.int32)
    cu_q = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 48, 96], dtype=torch.int32, device=device)
    options = {"seqused_k": used.to(device)}
    keys = k.flatten(0, 1)
    if page_size:
        options["block_table"] = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32, device=device)
        keys = torch.empty(6, 16, 2, 16, device=device)
        keys[options["block_table"].long()] = k.unflatten(1, (3, 16))
    else:
        options["leftpad_k"] = pad.to(device)
    torch.manual_seed(1)
    dump = interface._flash_attn_varlen_forward(
        q, keys, keys, cu_q, cu_k, 6, 48, 0.3, 0.25, True, return_softmax=True, **options
    )[2]
    short = [row[first:last] for row, first, last in zip(k, pad.tolist(), used.tolist(), strict=True)]
    packed = torch.cat(short)
    cu_short = torch.tensor([0, len(short[0]), len(packed)], dtype=torch.int32, device=device)
    torch.manual_seed(1)
    expected = interface._flash_attn_varlen_forward(
        q, packed, packed, cu_q, cu_short, 6, 40, 0.3, 0.25, True, return_softmax=True
    )[2]
    torch.testing.assert_close(dump, expected)


@pytest.mark.parametrize("side", "qk")
def test_sequences_that_are_all_empty_have_an_empty_dump(side, device):
    """Lengths may be stated that no sequence has: they size the dump, and there is nothing to read for it."""
    rows, starts = torch.randn(8, 2, 16, device=device), torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    q, k = (rows[:0], rows) if side == "q" else (rows, rows[:0])
    cu_q, cu_k = (torch.zeros_like(starts) if len(x) == 0 else starts for x in (q, k))
    out, _, dump = flash_attn.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 5, 5, 0.1, return_attn_probs=True)
    assert dump.shape == (2, 2, 128, 128)
    assert not dump.any()
    assert not out.any()
