"""Rows are packed in order, put back where they were, and nothing leaks from the rows that are left out."""

import torch

from flash_attention.padding import Packing

KEEP = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, True]])
X = torch.arange(12.0).view(3, 4, 1, 1)


def test_kept_rows_come_first_and_in_order(device):
    packing = Packing.of(KEEP.to(device))
    packed = packing.pack(X.to(device)).flatten().tolist()
    assert packed[:5] == [0.0, 2.0, 3.0, 9.0, 11.0]
    assert sorted(packed) == list(range(12))
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [0, 3, 3, 5]


def test_strides_do_not_matter(device):
    packing, x = Packing.of(KEEP.to(device)), torch.randn(3, 2, 4, 5, device=device)
    assert torch.equal(packing.pack(x.transpose(1, 2)), packing.pack(x.transpose(1, 2).contiguous()))


def test_what_lies_behind_the_sequences_is_never_read(device):
    """The engine leaves those rows of its outputs and gradients open, so they may hold anything."""
    packing, x = Packing.of(KEEP.to(device)), X.to(device).requires_grad_()
    packed = packing.pack(x)
    behind = torch.arange(12, device=device)[:, None, None] >= 5
    (gradient,) = torch.autograd.grad(packed, x, torch.ones_like(packed).masked_fill(behind, torch.nan))
    assert torch.equal(gradient[..., 0, 0], KEEP.to(device).float())
    back = packing.unpack(packed.masked_fill(behind, torch.nan), fill=-1.0)
    assert torch.equal(back[..., 0, 0], X.to(device)[..., 0, 0].where(KEEP.to(device), -1.0))


def test_unpacking_is_differentiable(device):
    packing = Packing.of(KEEP.to(device))
    packed = torch.randn(12, 2, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(packing.unpack(packed), packed, X.to(device)[..., 0].expand(3, 4, 2))
    assert gradient[:5, 0].tolist() == [0.0, 2.0, 3.0, 9.0, 11.0]
