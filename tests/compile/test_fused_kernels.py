"""Every kernel beside attention compiles for GPUs that are absent, without spills and within shared memory."""

import re
from contextlib import ExitStack
from functools import partial
from unittest import mock

import gluon_harness
import harness
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn_plus.backends.triton_portable import is_interpreted
from flash_attn_plus.fused import activation as activations
from flash_attn_plus.fused import cross_entropy as cross_entropies
from flash_attn_plus.fused import norm_gluon, norm_launch, rotary

if is_interpreted():
    pytest.skip("kernels are interpreted in this process; run tests/compile in one of its own", allow_module_level=True)

from flash_attn_plus.kernels.gluon import norm as gluon_norm
from flash_attn_plus.kernels.triton import activation, cross_entropy, norm, norm_long
from flash_attn_plus.kernels.triton import rotary as rotary_kernels

TARGETS = ("cuda:80", "cuda:90", "cuda:120", "hip:gfx942", "hip:gfx1100")
BF16, FP32 = torch.bfloat16, torch.float32
# Registers a thread that may be spilled: layer norm's backward pass holds more of so long a row than there are.
SPILLS = {"norm_backward-layer-16384": 40}


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor whose memory is never read."""
    return torch.empty(shape, dtype=dtype)


def norm_forward(cols: int, is_rms_norm: bool, dtype: torch.dtype = BF16, has_dropout: bool = False) -> None:
    """With a residual, as in a transformer block."""
    x, w, s = empty(4, cols, dtype=dtype), empty(cols, dtype=dtype), empty(4, dtype=FP32)
    bias, mean = (None, None) if is_rms_norm else (w, s)
    x1, seeds, mask = (x, torch.empty(8, dtype=torch.int64), x.bool()) if has_dropout else (None, None, None)
    p = 0.1 if has_dropout else 0.0
    norm_launch.norm_forward(
        x, w, bias, x, x1, None, None, None, seeds, 1e-6, p, False, is_rms_norm, x, None, x, mean, s, mask, mask
    )


def norm_backward(
    cols: int, is_rms_norm: bool, dtype: torch.dtype = BF16, has_dropout: bool = False, has_two: bool = False
) -> None:
    """With a gradient that arrives at the residual stream."""
    x, w, s = empty(4, cols, dtype=dtype), empty(cols, dtype=dtype), empty(4, dtype=FP32)
    bias, mean = (None, None) if is_rms_norm else (w, s)
    seeds, p = (torch.empty(8, dtype=torch.int64), 0.1) if has_dropout else (None, 0.0)
    dy1, weight1, bias1 = (x, w, bias) if has_two else (None, None, None)
    dx1, dresidual = (x, x) if has_dropout else (None, None)
    norm_launch.norm_backward(
        x, x, w, bias, dy1, weight1, x, None, seeds, mean, s, p, False, is_rms_norm,
        x, dx1, dresidual, None, w, bias, weight1, bias1,
    )  # fmt: skip


def losses(classes: int, dtype: torch.dtype, smoothing: float = 0.0) -> None:
    """Forward and backward."""
    logits, labels, row = empty(4, classes, dtype=dtype), torch.empty(4, dtype=torch.int64), empty(4, dtype=FP32)
    numbers = (smoothing, 1.0, 0.0, -100, 0, classes)
    cross_entropies._forward_triton(logits, labels, None, *numbers, False, row, row, row)
    cross_entropies._backward_triton(row, logits, row, labels, *numbers, logits)


def rotate(half: int, interleaved: bool, dtype: torch.dtype, batch: int = 2, seqlen: int = 64, conjugate=False) -> None:
    """Of (batch, seqlen, 4 heads, 128)."""
    x, table = empty(batch, seqlen, 4, 128, dtype=dtype), empty(seqlen, half, dtype=dtype)
    rotary._apply_triton(x, table, table, 0, None, interleaved, torch.empty_like(x), conjugate)


def rotate_packed() -> None:
    """With offsets in a tensor, in place."""
    x, table = empty(64, 4, 128), empty(64, 64)
    starts = torch.empty(5, dtype=torch.int32)
    rotary._apply_triton(x, table, table, starts[1:], starts, False, x, False)


def elementwise(name: str) -> None:
    """Forward and backward on rows of 4096 with a bias, or on strided halves."""
    x, bias = empty(4, 4096), empty(4096)
    with mock.patch.object(activations, "uses_triton", return_value=True):
        if name == "swiglu":
            gate, up = empty(4, 8192).chunk(2, -1)
            activations._swiglu_forward(gate, up)
            activations._swiglu_backward(x, gate, up)
        else:
            activations._activation_forward(x, bias, name)
            activations._activation_backward(x, x, bias, name)


CASES = {
    **{
        f"{run.__name__}-{'rms' if is_rms_norm else 'layer'}-{cols}": partial(run, cols, is_rms_norm)
        for run in (norm_forward, norm_backward)
        for cols in (3000, 16384)
        for is_rms_norm in (True, False)
    },
    "norm_backward-layer-8192": partial(norm_backward, 8192, False),
    "norm_forward-float32": partial(norm_forward, 8192, False, FP32),
    "norm_backward-float32": partial(norm_backward, 8192, False, FP32),
    "norm_forward-dropout": partial(norm_forward, 4096, False, has_dropout=True),
    "norm_backward-dropout": partial(norm_backward, 4096, False, has_dropout=True),
    "norm_backward-two": partial(norm_backward, 4096, False, has_two=True),
    "cross_entropy-32000": partial(losses, 32000, BF16),
    "cross_entropy-128256": partial(losses, 128256, FP32, 0.1),
    "cross_entropy-50257": partial(losses, 50257, BF16, 0.1),
    "rotary-halves": partial(rotate, 64, False, BF16),
    "rotary-pairs": partial(rotate, 64, True, BF16),
    "rotary-partial": partial(rotate, 20, False, FP32),
    "rotary-packed": rotate_packed,
    "gelu_approx": partial(elementwise, "gelu_approx"),
    "swiglu": partial(elementwise, "swiglu"),
}
KERNELS = (
    (norm, ("norm_forward_kernel", "norm_backward_kernel", "norm_column_sums_kernel", "norm_totals_kernel")),
    (norm_long, ("norm_long_forward_kernel",)),
    (cross_entropy, ("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel")),
    (rotary_kernels, ("rotary_kernel",)),
    (
        activation,
        (
            "activation_forward_kernel", "activation_backward_kernel",
            "swiglu_forward_kernel", "swiglu_backward_kernel",
        ),
    ),
)  # fmt: skip


def launches_of(call, target: str) -> list[harness.Launch]:
    """What the launchers would start on the target."""
    with ExitStack() as stack:
        recorded = [stack.enter_context(harness.recorded(*kernels, target)) for kernels in KERNELS]
        call()
    found = [launch for launches in recorded for launch in launches]
    assert found
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_within_the_machine(target, name):
    for launch in launches_of(CASES[name], target):
        report = harness.report(harness.compile_launch(launch, target))
        assert report.shared <= harness.SHARED_MEMORY[target]
        assert report.spills <= SPILLS.get(name, 0)


@pytest.mark.parametrize(
    "name", ["norm_forward-rms-16384", "cross_entropy-32000", "rotary-halves", "rotary-pairs", "swiglu"]
)
def test_memory_is_read_and_written_sixteen_bytes_at_a_time(name):
    for launch in launches_of(CASES[name], "cuda:90"):
        assembly = harness.report(harness.compile_launch(launch, "cuda:90")).assembly
        assert re.search(r"LDG\.E(\.E[LF])?\.128", assembly)  # with or without advice to the cache
        if "fwd" not in launch.kernel.__name__:  # a loss is one number a row
            assert "STG.E.128" in assembly


@pytest.mark.parametrize("cols", [8208, 16384])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_long_rows_go_through_shared_memory_on_hopper(cols, is_rms_norm):
    """Sixteen bytes at a time, and nothing is spilled, though all of a gradient's sums are in registers."""
    with (
        mock.patch.object(norm_gluon, "_has_gluon", return_value=True),
        harness.recorded(gluon_norm, ("norm_long_backward_kernel",), "cuda:90") as found,
        harness.recorded(norm, ("norm_totals_kernel",), "cuda:90"),
    ):
        norm_backward(cols, is_rms_norm)
    (launch,) = found
    report = harness.report(gluon_harness.compile_gluon(launch))
    assert report.shared <= harness.SHARED_MEMORY["cuda:90"]
    assert report.spills == 0
    copies = [line for line in report.assembly.splitlines() if "LDGSTS" in line]
    assert copies
    assert all("LDGSTS.E.BYPASS.128" in line for line in copies)
    assert "STG.E.128" in report.assembly


def test_cross_entropy_reads_without_waiting_for_other_threads():
    forward, _ = launches_of(CASES["cross_entropy-32000"], "cuda:90")
    assembly = harness.report(harness.compile_launch(forward, "cuda:90")).assembly
    loads = [i for i, line in enumerate(assembly.splitlines()) if "LDG.E.128" in line]
    barriers = [i for i, line in enumerate(assembly.splitlines()) if "BAR.SYNC" in line]
    assert max(loads) < min(barriers)


def test_rotary_compiles_once_a_direction():
    """Neither batch, nor length, nor the tables' length makes another kernel."""
    keys = set()
    for batch in (1, 4, 32):
        for seqlen in (1, 16, 100, 128, 256):
            for conjugate in (False, True):
                call = partial(rotate, 64, False, BF16, batch, seqlen, conjugate)
                (launch,) = launches_of(call, "cuda:90")
                keys.add(harness_key(launch))
    assert len(keys) == 2


def harness_key(launch: harness.Launch) -> str:
    """What Triton's cache of compiled kernels is keyed by."""
    backend = harness.make_backend(harness.parse_target("cuda:90"))
    binder = harness.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    _, specialization, options = binder(*launch.args, debug=False, **launch.options)
    return str(specialization) + str(options)


def test_rotary_is_traced_with_its_launch():
    """torch.compile sees the kernel itself, not an opaque call."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    with FakeTensorMode(), mock.patch("torch.utils._triton.has_triton", return_value=True):
        x = torch.empty(2, 16, 4, 64, device="cuda", dtype=BF16)
        table = torch.empty(16, 32, device="cuda", dtype=BF16)
        torch.compile(rotary.apply_rotary, fullgraph=True, backend=backend)(x, table, table)
    assert "triton_kernel_wrapper" in graphs[0]
