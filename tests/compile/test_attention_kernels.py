"""Every portable attention kernel compiles for every declared target, as its launcher would launch it there."""

import re

import pytest
import torch
from harness import SHARED_MEMORY, TARGETS, Launch, compile_launch, recorded, report, stray_products

from flash_attn_plus import ops
from flash_attn_plus.backends import triton_launch
from flash_attn_plus.kernels.triton import backward as backward_kernels
from flash_attn_plus.kernels.triton import forward as forward_kernels
from flash_attn_plus.problem import AttentionInputs, describe
from flash_attn_plus.tuning import heuristics

FORWARD = ("attention_forward_kernel",)
BACKWARD = ("attention_statistics_kernel", "attention_backward_dkdv_kernel", "attention_backward_dq_kernel")
# Registers that may spill, with the reason; everything else spills none.
SPILLS = {
    # On Hopper the fastest measured tiles keep a few loop invariants in local memory; smaller ones ran slower.
    ("cuda:90", "attention_forward_kernel"): 8,
    ("cuda:90", "attention_backward_dkdv_kernel"): 100,
    # RDNA3 holds matrix operands twice: no tile of head dim 128 fits its registers.
    ("hip:gfx1100", "attention_backward_dq_kernel"): 300,
}


def launches(
    target: str, head_dim: int, causal: bool, dtype=torch.bfloat16, is_rich: bool = False, length: int = 512
) -> list[Launch]:
    """All launches of a forward and a backward pass; `is_rich` turns every feature on that fits together."""
    q, k = torch.empty(2, length, 8, head_dim, dtype=dtype), torch.empty(2, length, 2, head_dim, dtype=dtype)
    left, features = -1, {}
    if is_rich:
        q, k, left = q.flatten(0, 1), k.flatten(0, 1), 100
        cu = torch.tensor([0, 300, 1024], dtype=torch.int32)
        features = {
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu,
            "alibi_slopes": torch.zeros(8),
            "dropout_p": 0.1,
            "rng_state": torch.zeros(2, dtype=torch.int64),
        }
    inputs = AttentionInputs(q, k, k, head_dim**-0.5, **features)
    forward, backward = (
        describe(inputs, length, length, left, 0 if causal else -1, is_backward=is_backward)
        for is_backward in (False, True)
    )
    out, lse = ops.allocate_outputs(q, k, is_rich)
    triton_launch.forget_fitting()
    with recorded(forward_kernels, FORWARD, target) as first:
        triton_launch.forward(forward, inputs, out, lse)
    with recorded(backward_kernels, BACKWARD, target) as then:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
        triton_launch.backward(backward, inputs, out, out, lse, None, *grads, lse)
    triton_launch.forget_fitting()
    return first + then


def check(target: str, launch: Launch, spills_allowed: bool) -> None:
    found = report(compile_launch(launch, target))
    name = launch.kernel.__name__
    assert found.shared <= SHARED_MEMORY[target], f"{name} uses {found.shared} bytes of shared memory"
    if not spills_allowed:
        limit = SPILLS.get((target, name), 0)
        assert found.spills <= limit, f"{name} spills {found.spills} registers with {launch.options} {launch.args[-7:]}"
    if target == "cuda:90" and "statistics" not in name:
        assert "HGMMA" in found.assembly, f"{name} does not use the warpgroup products"
        by_descriptor = any(getattr(value, "has_descriptors", False) for value in launch.args)
        assert ("UTMALDG" in found.assembly) == by_descriptor, f"{name} does not use the copy engine for what it should"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_causal_without_spills(target: str, head_dim: int):
    for launch in launches(target, head_dim, causal=True):
        check(target, launch, spills_allowed=False)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_full_without_spills(target: str, head_dim: int):
    for launch in launches(target, head_dim, causal=False):
        check(target, launch, spills_allowed=False)


@pytest.mark.parametrize(
    ("head_dim", "causal", "length"),
    [(64, True, 512), (128, False, 512), (128, False, 4096), (128, True, 512), (256, True, 512)],
)
def test_hopper_with_descriptors(head_dim: int, causal: bool, length: int, monkeypatch):
    monkeypatch.setattr(heuristics, "_DESCRIPTOR_FAMILIES", frozenset({"cuda90"}))
    heuristics._known.cache_clear()
    for launch in launches("cuda:90", head_dim, causal, length=length):
        check("cuda:90", launch, spills_allowed=False)
    heuristics._known.cache_clear()


@pytest.mark.parametrize("causal", [False, True])
def test_hopper_takes_powers_under_the_next_products(causal: bool):
    launch, *_ = launches("cuda:90", 128, causal, length=2048)
    kinds = {"HGMMA": "p", "MUFU.EX2": "e", "WARPGROUP.DEPBAR": "|"}
    order = re.findall("|".join(map(re.escape, kinds)), report(compile_launch(launch, "cuda:90")).assembly)
    under = re.findall("p[pe]*p", "".join(kinds[word] for word in order))
    assert max(run.count("e") for run in under) >= 24  # of a thread's 32 in a tile


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 16), (33, 1)])
def test_hopper_products_of_unaligned_tensors_find_their_operands(head_dim: int, head_dim_v: int):
    """CUDA 12.8's assembler loses addresses where tiles of two layouts take turns in a place."""
    q, k, v = (
        torch.empty(2 * 512 * heads * d + 1, dtype=torch.bfloat16)[1:].view(2, 512, heads, d)
        for heads, d in ((8, head_dim), (2, head_dim), (2, head_dim_v))
    )
    inputs = AttentionInputs(q, k, v, head_dim**-0.5)
    with recorded(forward_kernels, FORWARD, "cuda:90") as found:
        triton_launch.forward(describe(inputs, 512, 512, -1, 0), inputs, *ops.allocate_outputs(q, v, False))
    triton_launch.forget_fitting()
    assembly = report(compile_launch(found[0], "cuda:90")).assembly
    assert "HGMMA" in assembly
    assert not stray_products(assembly)


@pytest.mark.parametrize("target", TARGETS)
def test_head_dim_256_fits(target: str):
    for launch in launches(target, 256, causal=True):
        check(target, launch, spills_allowed=True)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942", "hip:gfx1100"])
def test_every_feature_together_fits(target: str):
    for launch in launches(target, 80, causal=True, is_rich=True):
        check(target, launch, spills_allowed=True)


@pytest.mark.parametrize("target", ["cuda:86", "cuda:90", "hip:gfx942"])
def test_float32_fits(target: str):
    for launch in launches(target, 64, causal=True, dtype=torch.float32):
        found = report(compile_launch(launch, target))
        assert found.shared <= SHARED_MEMORY[target]


@pytest.mark.parametrize(("precision", "is_on_tensor_cores"), [("ieee", False), ("tf32", True), ("tf32x3", True)])
def test_the_precision_of_float32_chooses_the_products(precision: str, is_on_tensor_cores: bool, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_FP32_PRECISION", precision)
    launch = launches("cuda:80", 64, causal=False, dtype=torch.float32)[0]
    assembly = report(compile_launch(launch, "cuda:80")).assembly
    assert ("HMMA.1688.F32.TF32" in assembly) == is_on_tensor_cores
