"""The description of a call, and that every refusal names its argument."""

import pytest
import torch

from flash_attn_plus import InvalidArgument, attention
from flash_attn_plus.checks import check_arguments, check_values
from flash_attn_plus.problem import AttentionInputs, describe, normalize_band
from flash_attn_plus.reference import visible


def dense(b=2, sq=5, sk=7, h=4, hk=2, d=8, dv=8, dtype=torch.float32, **options):
    q, k, v = (torch.zeros(b, s, n, w, dtype=dtype) for s, n, w in ((sq, h, d), (sk, hk, d), (sk, hk, dv)))
    return AttentionInputs(q, k, v, 0.3, **options)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def packed(**options):
    lengths = {"cu_seqlens_q": ints(0, 4, 10), "cu_seqlens_k": ints(0, 7, 14)}
    flat = {name: getattr(dense(), name).flatten(0, 1) for name in "qkv"}
    return dense()._replace(**(flat | lengths | options))


def paged(**options):
    x = dense()
    pages = {"k": torch.zeros(9, 4, 2, 8), "v": torch.zeros(9, 4, 2, 8), "block_table": ints(1, 2, 3, 4).view(2, 2)}
    return x._replace(**(pages | {"seqused_k": ints(3, 8)} | options))


def test_describe_dense():
    p = describe(dense(softcap=1.0), 0, 0, 2, 1, is_backward=True)
    assert (p.batch, p.seqlen_q, p.seqlen_k, p.heads, p.heads_k, p.head_dim, p.head_dim_v) == (2, 5, 7, 4, 2, 8, 8)
    assert (p.left, p.right, p.has_softcap, p.is_backward) == (2, 1, True, True)
    assert not any((p.is_varlen_q, p.is_varlen_k, p.page_size, p.has_alibi, p.has_dropout))
    assert hash(p) == hash(describe(dense(softcap=9.0), 0, 0, 2, 1, is_backward=True))


def test_describe_packed_takes_the_stated_maxima():
    p = describe(packed(), 6, 7, -1, 0)
    assert (p.batch, p.seqlen_q, p.seqlen_k, p.is_varlen_q, p.is_varlen_k) == (2, 6, 7, True, True)


def test_describe_paged_takes_the_capacity():
    p = describe(paged(), 0, 0, -1, -1)
    assert (p.batch, p.seqlen_k, p.page_size, p.has_seqused_k, p.is_varlen_k) == (2, 8, 4, True, False)


@pytest.mark.parametrize(
    ("band", "lengths", "expected"),
    [
        ((-1, -1), (5, 7), (-1, -1)),
        ((-7, -2), (5, 7), (-1, -1)),
        ((6, 4), (5, 7), (-1, -1)),
        ((5, 3), (5, 7), (5, 3)),
        ((0, 0), (5, 7), (0, 0)),
        ((0, 0), (1, 7), (0, -1)),
        ((0, 0), (5, 1), (-1, 0)),
    ],
)
def test_bounds_that_cannot_bind_are_dropped(band, lengths, expected):
    assert normalize_band(*band, *lengths) == expected


@pytest.mark.parametrize("lengths", [(1, 1), (1, 6), (6, 1), (4, 7), (7, 4), (5, 5)])
def test_normalized_band_is_the_same_mask(lengths):
    for left in range(-1, 9):
        for right in range(-1, 9):
            kept = normalize_band(left, right, *lengths)
            masks = (visible(*lengths, *band, torch.device("cpu")) for band in ((left, right), kept))
            assert torch.equal(*masks), (left, right, kept)


GOOD = {"dense": dense(), "packed": packed(), "paged": paged(), "value_width": dense(dv=16), "alibi": dense(
    alibi_slopes=torch.zeros(2, 4)), "leftpad": dense(leftpad_k=ints(1, 2), seqused_k=ints(7, 7))}  # fmt: skip


@pytest.mark.parametrize("inputs", GOOD.values(), ids=GOOD)
def test_sound_arguments_pass(inputs):
    check_arguments(inputs)


def _changed(**tensors):
    return dense()._replace(**tensors)


BAD = {
    "integer q": (dense(dtype=torch.int32), "q has torch.int32"),
    "k dtype": (_changed(k=torch.zeros(2, 7, 2, 8).half()), "same dtype: k has"),
    "v dtype": (_changed(v=torch.zeros(2, 7, 2, 8).half()), "same dtype: v has"),
    "k device": (_changed(k=torch.zeros(2, 7, 2, 8, device="meta")), "k must be on cpu"),
    "v device": (_changed(v=torch.zeros(2, 7, 2, 8, device="meta")), "v must be on cpu"),
    "q rank": (_changed(q=torch.zeros(5, 4, 8)), r"q must have shape \(batch, seqlen_q, heads, head_dim\)"),
    "k rank": (_changed(k=torch.zeros(7, 2, 8)), "k must have shape"),
    "packed q rank": (packed(q=torch.zeros(2, 5, 4, 8)), r"q must have shape \(total_q"),
    "k batch": (_changed(k=torch.zeros(3, 7, 2, 8)), "k must have shape"),
    "k head dim": (_changed(k=torch.zeros(2, 7, 2, 9)), "k must have shape"),
    "v length": (_changed(v=torch.zeros(2, 6, 2, 8)), "v must have shape"),
    "v heads": (_changed(v=torch.zeros(2, 7, 4, 8)), "v must have shape"),
    "heads": (dense(h=4, hk=3), "q has 4 and k has 3"),
    "no key heads": (dense(hk=0), "Number of heads"),
    "head dim": (dense(d=513), "q has 513"),
    "value head dim": (dense(dv=513), "v has 513"),
    "empty head dim": (dense(d=0), "head_dim must be positive"),
    "batch": (dense(b=0), "batch size must be positive"),
    "cu_seqlens_q dtype": (packed(cu_seqlens_q=ints(0, 4, 10).long()), "cu_seqlens_q must have dtype int32"),
    "cu_seqlens_q rank": (packed(cu_seqlens_q=ints(0, 4, 10)[None]), "cu_seqlens_q must have shape"),
    "cu_seqlens_q strides": (packed(cu_seqlens_q=ints(0, 0, 4, 4, 10, 10)[::2]), "cu_seqlens_q must be contiguous"),
    "cu_seqlens_k size": (packed(cu_seqlens_k=ints(0, 14)), r"cu_seqlens_k must have shape \(3,\)"),
    "cu_seqlens_k device": (packed(cu_seqlens_k=ints(0, 7, 14).to("meta")), "cu_seqlens_k must be on cpu"),
    "seqused_k size": (dense(seqused_k=ints(1)), r"seqused_k must have shape \(2,\)"),
    "seqused_k dtype": (dense(seqused_k=torch.ones(2)), "seqused_k must have dtype int32"),
    "leftpad_k size": (dense(leftpad_k=ints(1, 1, 1)), r"leftpad_k must have shape \(2,\)"),
    "block_table dtype": (paged(block_table=torch.zeros(2, 2).long()), "block_table must have dtype torch.int32"),
    "block_table batch": (paged(block_table=ints(1, 2, 3).view(3, 1)), r"block_table must have shape \(2, max_blocks"),
    "block_table strides": (paged(block_table=ints(1, 2, 3, 4).view(2, 2).t()), "block_table must have contiguous"),
    "block_table device": (paged(block_table=ints(1, 2).view(2, 1).to("meta")), "block_table must be on cpu"),
    "block_table without lengths": (paged(seqused_k=None), "block_table needs cu_seqlens_k or seqused_k"),
    "block_table and leftpad_k": (paged(leftpad_k=ints(0, 0)), "leftpad_k are not supported together"),
    "alibi dtype": (dense(alibi_slopes=torch.zeros(4).half()), "ALiBi slopes must have dtype fp32"),
    "alibi shape": (dense(alibi_slopes=torch.zeros(5)), r"alibi_slopes must have shape \(4,\) or \(2, 4\)"),
    "alibi strides": (dense(alibi_slopes=torch.zeros(8)[::2]), "ALiBi slopes tensor must have contiguous"),
    "alibi device": (dense(alibi_slopes=torch.zeros(4, device="meta")), "alibi_slopes must be on cpu"),
    "dropout of one": (dense(dropout_p=1.0), "p_dropout must be in"),
    "negative dropout": (dense(dropout_p=-0.1), "p_dropout must be in"),
    "scale that is no number": (_changed(softmax_scale=float("nan")), "softmax_scale must be finite"),
    "endless softcap": (dense(softcap=float("inf")), "softcap must be finite"),
    "softcap and dropout": (dense(softcap=2.0, dropout_p=0.1), "Softcapping does not support dropout"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD)
def test_refusal_names_the_argument(inputs, message):
    with pytest.raises(InvalidArgument, match=message):
        check_arguments(inputs)


BAD_VALUES = {
    "start": (packed(cu_seqlens_q=ints(1, 4, 10)), "cu_seqlens_q must start at 0"),
    "decrease": (packed(cu_seqlens_k=ints(0, 9, 7)), "cu_seqlens_k must not decrease"),
    "maximum": (packed(cu_seqlens_q=ints(0, 1, 10)), "max_seqlen_q is 7, but cu_seqlens_q holds a sequence of 9"),
    "end": (packed(cu_seqlens_k=ints(0, 7, 15)), "max_seqlen_k is 7, but cu_seqlens_k holds a sequence of 8"),
    "beyond": (packed(cu_seqlens_q=ints(0, 6, 11)), "cu_seqlens_q ends at 11, beyond the 10 rows of q"),
    "too few pages": (paged(seqused_k=ints(3, 9)), "block_table has 2 pages a sequence, but the longest needs 3"),
    "page id": (paged(block_table=ints(1, 2, 3, 9).view(2, 2)), r"block_table holds a page id outside \[0, 9\)"),
    "negative lengths": (paged(seqused_k=ints(3, -1)), "must not be negative: -1"),
    "lengths beyond the keys": (dense(seqused_k=ints(7, 8)), "must lie between 0 and 7"),
    "negative padding": (dense(leftpad_k=ints(0, -2)), "must not be negative, but holds -2"),
    "slope": (dense(alibi_slopes=torch.tensor([0.1, 0.2, torch.nan, 0.3])), "alibi_slopes holds NaN"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_debug_mode_checks_values(inputs, message):
    check_arguments(inputs)
    with pytest.raises(InvalidArgument, match=message):
        check_values(inputs, 7, 7)


@pytest.mark.parametrize("inputs", GOOD.values(), ids=GOOD)
def test_debug_mode_accepts_sound_values(inputs):
    check_values(inputs, 7, 7)


def test_debug_mode_is_switched_by_the_environment_at_call_time(monkeypatch):
    x = packed(cu_seqlens_q=ints(0, 6, 11))

    def call():
        lengths = {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
        attention(x.q, x.k, x.v, **lengths, max_seqlen_q=7, max_seqlen_k=7)

    monkeypatch.setenv("FLASH_ATTENTION_DEBUG", "1")
    with pytest.raises(InvalidArgument, match="beyond the 10 rows of q"):
        call()


def test_calls_without_a_backward_refuse_gradients():
    x = dense(seqused_k=ints(7, 7))
    with pytest.raises(InvalidArgument, match="seqused_k and leftpad_k have no backward"):
        attention(x.q.requires_grad_(), x.k, x.v, seqused_k=x.seqused_k)


def test_packed_call_needs_its_maximal_lengths():
    x = packed()
    with pytest.raises(InvalidArgument, match="max_seqlen_q is required with cu_seqlens"):
        attention(x.q, x.k, x.v, cu_seqlens_q=x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k)


def test_refusals_are_runtime_and_value_errors():
    assert issubclass(InvalidArgument, RuntimeError)
    assert issubclass(InvalidArgument, ValueError)


def test_a_head_dim_of_zero_is_refused_with_a_sentence():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(InvalidArgument, match="head_dim must be positive"):
        attention(q[..., :0], q[..., :0], q)
