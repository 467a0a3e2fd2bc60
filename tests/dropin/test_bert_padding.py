"""Padding helpers: values, gradients, and the re-exported names."""

import einops
import pytest
import torch
from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
KEPT = [0, 1, 2, 5, 10, 11, 12, 13, 14]


def test_einops_names_are_exported():
    assert bert_padding.rearrange is einops.rearrange
    assert bert_padding.repeat is einops.repeat


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
@pytest.mark.parametrize("tail", [(), (7,), (2, 3)])
def test_unpad_input(tail, dtype):
    x = torch.randn(3, 5, *tail) if tail else torch.randn(3, 5, 1)
    rows, indices, cu_seqlens, longest, seqused = unpad_input(x, MASK.to(dtype))
    assert torch.equal(rows, x.flatten(0, 1)[KEPT])
    assert (indices.dtype, indices.tolist()) == (torch.int64, KEPT)
    assert (cu_seqlens.dtype, cu_seqlens.tolist()) == (torch.int32, [0, 3, 4, 9])
    assert (type(longest), longest) == (int, 5)
    assert (seqused.dtype, seqused.tolist()) == (torch.int32, [3, 1, 5])


def test_unused_tokens_are_packed_but_not_counted():
    unused = torch.tensor([[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    x = torch.randn(3, 5, 2)
    rows, indices, cu_seqlens, longest, seqused = unpad_input(x, MASK, unused)
    assert indices.tolist() == sorted([*KEPT, 3, 6])
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 4, 6, 11]
    assert longest == 5
    assert seqused.tolist() == [3, 1, 5]


def test_round_trip_and_its_gradients():
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    rows, indices, *_ = unpad_input(x, MASK)
    padded = pad_input(hidden_states=rows, indices=indices, batch=3, seqlen=5)
    assert torch.equal(padded, x * MASK[..., None])
    upstream = torch.randn_like(padded)
    (grad,) = torch.autograd.grad(padded, x, upstream)
    assert torch.equal(grad, upstream * MASK[..., None])


def test_gradients_are_the_numerical_ones():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 5])
    assert torch.autograd.gradcheck(lambda t: index_first_axis(t, indices), (x,))
    rows = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: index_put_first_axis(t, indices, 6), (rows,))
    assert torch.autograd.gradcheck(lambda t: index_first_axis_residual(t, indices), (x,))


def test_gradient_of_repeated_rows_is_assigned():
    x = torch.randn(4, 2, requires_grad=True)
    rows = index_first_axis(x, torch.tensor([1, 1]))
    (grad,) = torch.autograd.grad(rows, x, torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    assert torch.equal(grad[1], torch.tensor([1.0, 2.0]))
    assert not grad[[0, 2, 3]].any()


def test_residual_gradient_is_accumulated_in_place():
    x = torch.randn(5, 3, requires_grad=True)
    indices = torch.tensor([3, 1])
    rows, residual = index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices])
    assert torch.equal(residual, x)
    buffer = torch.ones(5, 3)
    (grad,) = torch.autograd.grad((rows, residual), x, (torch.full((2, 3), 2.0), buffer))
    assert grad[:, 0].tolist() == [1.0, 3.0, 1.0, 3.0, 1.0]
    assert grad.data_ptr() == buffer.data_ptr()
    expanded = torch.ones(1, 1).expand(5, 3)
    (grad,) = torch.autograd.grad(index_first_axis_residual(x, indices), x, (torch.full((2, 3), 2.0), expanded))
    assert grad[:, 0].tolist() == [1.0, 3.0, 1.0, 3.0, 1.0]


def test_concatenated_sequences():
    in_length = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2)
    rows, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, in_length)
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    assert (cu_seqlens.dtype, cu_seqlens.tolist()) == (torch.int32, [0, 2, 5, 8, 10, 16])
    assert (type(longest), longest) == (int, 6)


@pytest.mark.parametrize("function", [index_first_axis, index_first_axis_residual])
def test_one_dimensional_input_is_refused(function):
    with pytest.raises(AssertionError):
        function(torch.randn(4), torch.tensor([0]))


def test_attention_over_unpadded_rows(device):
    """The usual chain: unpad, attend, pad; equal to attention over the valid tokens of every row alone."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = torch.randn(3, 3, 5, 2, 16, device=device).unbind(0)
    mask = MASK.to(device)
    rows, indices, cu_seqlens, longest, _ = unpad_input(q, mask)
    keys, values = unpad_input(k, mask)[0], unpad_input(v, mask)[0]
    out = flash_attn_varlen_func(rows, keys, values, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    padded = pad_input(out, indices, 3, 5)
    for n, length in enumerate((3, 1, 5)):
        alone = flash_attn_func(*(x[n : n + 1, :length] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(padded[n : n + 1, :length], alone)
        assert not padded[n, length:].any()


def test_nothing_to_pack():
    empty = torch.zeros(0, 5, 7)
    rows, indices, cu_seqlens, longest, seqused = unpad_input(empty, torch.zeros(0, 5))
    assert (rows.shape, indices.tolist(), cu_seqlens.tolist(), longest, seqused.tolist()) == ((0, 7), [], [0], 0, [])
    lengths = torch.zeros(2, 5, dtype=torch.long)
    rows, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(torch.zeros(2, 5, 7), lengths)
    assert (rows.shape, indices.tolist(), cu_seqlens.tolist(), longest) == ((0, 7), [], [0], 0)
