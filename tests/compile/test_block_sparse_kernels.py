"""Kernels under a block mask compile for every target, as their launcher would launch them there."""

import pytest
import torch
from harness import SHARED_MEMORY, Launch, compile_launch, recorded, report

from flash_attn_plus import ops
from flash_attn_plus.backends import triton_launch
from flash_attn_plus.kernels.triton import backward, block_lists, forward
from flash_attn_plus.problem import AttentionInputs, describe

LISTS = ("attention_lists_kernel",)
# Registers that may spill, with the reason; everything else spills none.
SPILLS = {
    # As without a mask: the fastest measured tiles keep a few loop invariants in local memory.
    ("cuda:90", "attention_forward_kernel"): 8,
    ("cuda:90", "attention_backward_dkdv_kernel"): 100,
    ("hip:gfx1100", "attention_backward_dq_kernel"): 300,
}


def launches(target: str, block_size: tuple[int, int], head_dim: int = 128, is_rich: bool = False) -> list[Launch]:
    """Launches of a causal forward and backward pass, of the lists once; `is_rich` adds packing, ALiBi and dropout."""
    q, k = (torch.empty(2, 512, heads, head_dim, dtype=torch.bfloat16) for heads in (8, 2))
    mask = torch.ones(2 if is_rich else 1, 8, -(-512 // block_size[0]), -(-512 // block_size[1]), dtype=torch.bool)
    features = {}
    if is_rich:
        q, k, cu = q.flatten(0, 1), k.flatten(0, 1), torch.tensor([0, 512, 1024], dtype=torch.int32)
        features = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "alibi_slopes": torch.zeros(8), "dropout_p": 0.1}
        features["rng_state"] = torch.zeros(2, dtype=torch.int64)
    inputs = AttentionInputs(q, k, k, head_dim**-0.5, block_mask=mask, block_size=block_size, **features)
    problems = [describe(inputs, 512, 512, -1, 0, is_backward=is_backward) for is_backward in (False, True)]
    out, lse = ops.allocate_outputs(q, k, is_rich)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    triton_launch.forget_fitting()
    with (
        recorded(block_lists, LISTS, target) as lists,
        recorded(forward, ("attention_forward_kernel",), target) as first,
        recorded(backward, ("attention_statistics_kernel",), target),
        recorded(backward, ("attention_backward_dkdv_kernel", "attention_backward_dq_kernel"), target) as then,
    ):
        triton_launch.forward(problems[0], inputs, out, lse)
        triton_launch.backward(problems[1], inputs, out, out, lse, None, *grads, lse)
    triton_launch.forget_fitting()
    assert len(lists) == 3
    return lists[:1] + first + then


def check(target: str, launch: Launch, spills_allowed: bool) -> None:
    found, name = report(compile_launch(launch, target)), launch.kernel.__name__
    assert found.shared <= SHARED_MEMORY[target], f"{name} uses {found.shared} bytes of shared memory"
    limit = SPILLS.get((target, name), 0)
    assert spills_allowed or found.spills <= limit, f"{name} spills {found.spills} registers with {launch.options}"
    if target == "cuda:90" and "lists" not in name:
        assert "HGMMA" in found.assembly, f"{name} does not use the warpgroup products"


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100"])
def test_whole_tiles_without_spills(target: str):
    for launch in launches(target, (128, 128)):
        check(target, launch, spills_allowed=False)


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_cut_tiles_and_every_feature_fit(target: str):
    for launch in launches(target, (16, 256), head_dim=80, is_rich=True):
        check(target, launch, spills_allowed=True)
