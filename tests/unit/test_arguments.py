"""Numbers of any kind are taken as what they are worth, and what is no number is refused by name."""

import numpy as np
import pytest
import torch

from flash_attn_plus import InvalidArgument, attention, attention_with_kvcache
from flash_attn_plus.arguments import as_length, window_bounds

Q, K = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
STARTS = torch.tensor([0, 9, 18], dtype=torch.int32)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5])])
@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "dropout_p"])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_numbers_of_other_kinds_give_what_floats_give(number, name, needs_gradient):
    q = Q.clone().requires_grad_(needs_gradient)
    results = []
    for value in (0.5, number):
        torch.manual_seed(0)
        results.append(attention(q, K, K, **{name: value}))
    assert torch.equal(*results)


def test_a_scale_tensor_is_read_at_every_call():
    scale = torch.tensor(0.5)
    before = attention(Q, K, K, softmax_scale=scale)
    scale.fill_(2.0)
    assert torch.equal(attention(Q, K, K, softmax_scale=scale), attention(Q, K, K, softmax_scale=2.0))
    assert torch.equal(before, attention(Q, K, K, softmax_scale=0.5))


@pytest.mark.parametrize("nine", [np.int32(9), np.int64(9), torch.tensor(9), np.array(9), 9.0])
def test_lengths_of_other_kinds_are_integers(nine):
    assert type(as_length("max_seqlen_q", nine, STARTS)) is int
    caches = torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 16)
    assert torch.equal(
        attention_with_kvcache(Q, *caches, cache_seqlens=nine), attention_with_kvcache(Q, *caches, cache_seqlens=9)
    )


@pytest.mark.parametrize("pair", [[3, 0], torch.tensor([3, 0]), np.array([3, 0]), (np.int32(3), torch.tensor(0))])
def test_a_window_may_be_any_pair(pair):
    assert window_bounds(pair, causal=False) == (3, 0)


def test_a_learned_scale_is_refused_where_it_would_not_learn():
    scale = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(InvalidArgument, match="softmax_scale gets no gradient"):
        attention(Q, K, K, softmax_scale=scale)
    with torch.no_grad():
        assert torch.equal(attention(Q, K, K, softmax_scale=scale), attention(Q, K, K, softmax_scale=0.5))


REFUSED = {
    "window_size": [None, 5, (1, 2, 3), torch.tensor(3), (None, None), (1.5, 2), "ab"],
    "softmax_scale": ["a", 1j, torch.ones(2), float("nan"), float("inf")],
    "softcap": [None, "2", float("nan"), float("inf")],
    "dropout_p": [None, "0.1"],
    "alibi_slopes": [[1.0] * 4, np.ones(4, np.float32)],
    "cu_seqlens_q": [[0, 9]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(InvalidArgument, match=name):
        attention(Q, K, K, **{name: value}, **({"max_seqlen_q": 9} if name == "cu_seqlens_q" else {}))


@pytest.mark.parametrize("length", ["9", 9.5, None, -1, [9]])
def test_a_length_that_is_no_count_is_refused_by_name(length):
    with pytest.raises(InvalidArgument, match="max_seqlen_q"):
        as_length("max_seqlen_q", length, STARTS)


@pytest.mark.parametrize("lengths", ["5", [5, 5], 5.5, -1, 2**40])
def test_lengths_of_a_cache_that_are_no_count_are_refused(lengths):
    with pytest.raises(InvalidArgument, match="cache_seqlens"):
        attention_with_kvcache(Q, K.clone(), K.clone(), cache_seqlens=lengths)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_seqlens": 10},
        {"cache_seqlens": torch.tensor([3, -2], dtype=torch.int32)},
        {"cache_leftpad": torch.tensor([-1, 0], dtype=torch.int32)},
        {"cache_batch_idx": torch.tensor([0, 2], dtype=torch.int32)},
        {"cache_batch_idx": torch.tensor([-1, 0], dtype=torch.int32)},
    ],
)
def test_a_cache_on_the_cpu_is_not_read_outside_its_rows(options):
    with pytest.raises(InvalidArgument, match="cache_"):
        attention_with_kvcache(Q, K.clone(), K.clone(), **options)


@pytest.mark.parametrize("starts", [[0, 12, 9], [0, 9, 40], [1, 9, 18], [0, -3, 18]])
@pytest.mark.parametrize("side", "qk")
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_starts_that_lead_out_of_a_packed_tensor_are_refused_on_the_cpu(starts, side, needs_gradient):
    q, k = Q.flatten(0, 1).requires_grad_(needs_gradient), K.flatten(0, 1)
    both = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, f"cu_seqlens_{side}": torch.tensor(starts).int()}
    with pytest.raises(InvalidArgument, match=f"cu_seqlens_{side}"):
        attention(q, k, k, **both, max_seqlen_q=40, max_seqlen_k=40)


def test_tensors_of_device_meta_give_shapes_alone():
    q, k = (x.to("meta").requires_grad_() for x in (Q, K))
    out = attention(q, k, k)
    assert out.is_meta
    assert out.shape == q.shape
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k))] == [q.shape, k.shape]
    with torch.no_grad():
        assert attention_with_kvcache(q, k, k, k, k, cache_seqlens=0).shape == q.shape
