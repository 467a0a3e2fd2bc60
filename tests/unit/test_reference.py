"""The oracle against PyTorch's own attention and hand-made masks, and the tolerance rule against wrong results."""

import pytest
import torch
import torch.nn.functional as F
from cases import cache, crossed, dense, large_logits, varlen

from flash_attn_plus import ops
from flash_attn_plus.reference import attention_reference, visible
from flash_attn_plus.testing import (
    Case,
    assert_close,
    assert_matches_reference,
    make_inputs,
    poisoned_outputs,
    run_forward,
    run_reference,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("is_causal", [False, True])
def test_oracle_agrees_with_sdpa(is_causal):
    q, k, v = normal(2, 9, 4, 8), normal(2, 9, 2, 8, seed=1), normal(2, 9, 2, 8, seed=2)
    out, lse = attention_reference(q, k, v, right=0 if is_causal else -1)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=is_causal, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert lse.shape == (2, 4, 9)


@pytest.mark.parametrize(
    ("lengths", "band", "rows"),
    [
        ((2, 5), (-1, 0), ["11110", "11111"]),
        ((5, 2), (-1, 0), ["00", "00", "00", "10", "11"]),
        ((3, 3), (1, 0), ["100", "110", "011"]),
        ((2, 5), (1, 1), ["00111", "00011"]),
        ((3, 3), (0, 0), ["100", "010", "001"]),
        ((5, 2), (1, -1), ["11", "11", "11", "11", "11"]),
        ((3, 3), (-1, -1), ["111", "111", "111"]),
    ],
)
def test_band_is_aligned_to_the_bottom_right_corner(lengths, band, rows):
    expected = torch.tensor([[c == "1" for c in row] for row in rows])
    assert torch.equal(visible(*lengths, *band, torch.device("cpu")), expected)


def test_alibi_bias_is_minus_slope_times_distance_to_the_aligned_key():
    q, k, v, slope = torch.zeros(1, 2, 1, 4), torch.zeros(1, 3, 1, 4), torch.eye(3).view(1, 3, 1, 3), 0.5
    out, _ = attention_reference(q, k, v, alibi_slopes=torch.tensor([slope]))
    distance = torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(out[0, :, 0], (-slope * distance).softmax(-1))


def test_packed_paged_and_padded_keys_mean_what_dense_ones_do():
    q, k, v = normal(2, 4, 2, 8), normal(2, 7, 2, 8, seed=1), normal(2, 7, 2, 8, seed=2)
    out, lse = attention_reference(q, k, v, right=0)
    cu_q, cu_k = torch.tensor([0, 4, 8], dtype=torch.int32), torch.tensor([0, 7, 14], dtype=torch.int32)
    packed, packed_lse = attention_reference(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), right=0, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
    )
    torch.testing.assert_close(packed, out.flatten(0, 1))
    torch.testing.assert_close(packed_lse, lse.transpose(0, 1).flatten(1))

    table = torch.tensor([[5, 0, 2], [1, 4, 3]], dtype=torch.int32)
    pages_k, pages_v = torch.full((6, 3, 2, 8), torch.nan).double(), torch.full((6, 3, 2, 8), torch.nan).double()
    for n in range(2):
        for t in range(7):
            pages_k[table[n, t // 3], t % 3], pages_v[table[n, t // 3], t % 3] = k[n, t], v[n, t]
    used = torch.tensor([7, 7], dtype=torch.int32)
    paged, _ = attention_reference(q, pages_k, pages_v, right=0, block_table=table, seqused_k=used)
    torch.testing.assert_close(paged, out)

    nan = torch.full((2, 2, 2, 8), torch.nan).double()
    padded, _ = attention_reference(
        q, torch.cat((nan, k, nan), 1), torch.cat((nan, v, nan), 1), right=0, seqused_k=used + 2,
        leftpad_k=torch.tensor([2, 2], dtype=torch.int32),
    )  # fmt: skip
    torch.testing.assert_close(padded, out)


def test_rows_without_keys_have_finite_gradients():
    q, k, v = normal(1, 5, 1, 4).requires_grad_(), normal(1, 2, 1, 4, seed=1), normal(1, 2, 1, 4, seed=2)
    out, lse = attention_reference(q, k, v, right=0)
    assert (out[:, :3] == 0).all()
    assert (lse[..., :3] == float("inf")).all()
    (grad,) = torch.autograd.grad((out, lse), q, (torch.ones_like(out), torch.ones_like(lse)))
    assert grad.isfinite().all()
    assert (grad[:, :3] == 0).all()


@pytest.mark.parametrize("name", ["causal_tall", "softcap", "alibi", "dropout", "varlen_causal", "no_key"])
def test_two_pass_gradients_are_those_of_autograd(name):
    case = (dense("small") | varlen("small"))[name]
    call = make_inputs(case, torch.float64)
    expected = run_reference(call, torch.float64, with_gradients=True, with_dlse=True)
    q, k, v = (x.nan_to_num().requires_grad_() for x in call.inputs[:3])
    options = {name: x for name, x in call.inputs._asdict().items() if name not in "qkv"}
    out, lse = attention_reference(q, k, v, left=call.left, right=call.right, is_two_pass=True, **options)
    grads = torch.autograd.grad((out, lse), (q, k, v), (call.dout, call.dlse))
    for grad, name in zip(grads, ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(grad, expected[name])


EVERY = {n: c for make in (dense, varlen, cache, crossed, large_logits) for n, c in make("small").items()}


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_described_case_is_the_call_it_makes(case):
    call = make_inputs(case, torch.bfloat16)
    assert call.problem(is_backward=True) == case.problem(torch.bfloat16, is_backward=True)


def test_inputs_repeat_by_seed_and_hold_nan_only_where_nothing_may_read():
    case = cache("small")["leftpad"]
    first, again, other = make_inputs(case, seed=1), make_inputs(case, seed=1), make_inputs(case, seed=2)
    torch.testing.assert_close(first.inputs.k, again.inputs.k, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first.inputs.q, other.inputs.q)
    for n, (start, stop) in enumerate(zip(case.leftpad, case.used, strict=True)):
        readable = torch.zeros(case.seqlen_k, dtype=torch.bool)
        readable[start:stop] = True
        assert torch.equal(~first.inputs.k[n].isnan().any(-1).any(-1), readable)


@pytest.mark.parametrize("layout", ["packed", "transposed", "sliced", "expanded"])
def test_layouts_have_other_strides_and_last_stride_one(layout):
    x = make_inputs(Case(2, 5, 7, 4, 4, 8, layout=layout)).inputs.q
    assert x.stride() != torch.empty(x.shape).stride()
    assert x.stride(-1) == 1


def test_poisoned_outputs_start_as_nan_within_the_block_only():
    q = torch.zeros(1, 2, 1, 4)
    with poisoned_outputs():
        made = *ops.allocate_outputs(q, q, False), *ops.allocate_alike(q, q)
    assert [bool(x.isnan().all()) for x in made] == [True] * 4
    assert {f.__module__ for f in (ops.allocate_outputs, ops.allocate_alike)} == {"flash_attn_plus.ops"}


def test_rule_allows_twice_the_error_of_eager_and_one_rounding_unit():
    reference = torch.tensor([1.0, 8.0], dtype=torch.float64)
    eager = reference + torch.tensor([0.0, 0.25])
    unit = torch.finfo(torch.float32).eps * 8
    assert_close("out", (reference + 0.5).float(), reference, eager)
    assert_close("out", (reference + torch.tensor([0.0, unit])).float(), reference, reference)
    with pytest.raises(AssertionError, match=r"out: error 5\.1"):
        assert_close("out", (reference + 0.51).float(), reference, eager)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close("out", (reference + torch.tensor([0.0, 2 * unit])).float(), reference, reference)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 3.0])
def test_rule_demands_finite_values_and_equal_infinities(wrong):
    reference = torch.tensor([torch.inf, 1.0], dtype=torch.float64)
    sound = reference.float()
    assert_close("lse", sound, reference, reference)
    for place in range(2):
        changed = sound.clone()
        changed[place] = -torch.inf if place == 0 and wrong == torch.inf else wrong
        with pytest.raises(AssertionError, match="lse"):
            assert_close("lse", changed, reference, reference)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("lse", sound[:1], reference, reference)


def test_unwritten_rows_of_poisoned_outputs_are_noticed():
    call = make_inputs(dense("small")["causal"])
    with poisoned_outputs():
        out, lse = ops.allocate_outputs(call.inputs.q, call.inputs.v, False)
    sound = run_forward(call)
    lse.copy_(sound["lse"])
    out[:, :-1] = sound["out"][:, :-1]
    with pytest.raises(AssertionError, match="out holds NaN"):
        assert_matches_reference(call, {"out": out, "lse": lse})
    out[:, -1] = sound["out"][:, -1]
    assert_matches_reference(call, {"out": out, "lse": lse})
