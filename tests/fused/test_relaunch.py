"""Kernels are launched again by what their first launch compiled: what may change between launches, and what not."""

from unittest import mock

import pytest
import torch
from formulas import normal

from flash_attn_plus import use_backend
from flash_attn_plus.backends import triton_relaunch, triton_replay
from flash_attn_plus.fused.cross_entropy import cross_entropy
from flash_attn_plus.fused.norm import norm_forward
from flash_attn_plus.fused.rotary import apply_rotary

GPU = torch.device("cuda", 0)


class Compiled:
    """Stands for Triton's CompiledKernel, and notes its launches."""

    function, packed_metadata = "function", "packed"

    def __init__(self):
        self.runs = []

    def run(self, *arguments):
        self.runs.append(arguments)


class Kernel:
    """Stands for a kernel, and notes the launches that bind arguments."""

    def __init__(self):
        self.bound, self.compiled = [], Compiled()

    def __getitem__(self, grid):
        def launch(*arguments, num_warps):
            self.bound.append((grid, arguments, num_warps))
            return self.compiled

        return launch


@pytest.fixture
def launch():
    """`launch` where its short cut is taken: on a GPU, with the Triton it is proven for."""
    with (
        mock.patch.object(triton_relaunch, "CompiledKernel", Compiled),
        mock.patch.object(triton_replay, "IS_PROVEN", True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: f"stream of {index}", create=True),
    ):
        yield triton_relaunch.launch


def aligned(*shape, dtype=torch.float32):
    x = torch.empty(*shape, dtype=dtype)
    assert x.data_ptr() % 16 == 0
    return x


def test_other_grids_tensors_and_numbers_need_no_binding(launch):
    kernel, x, y = Kernel(), aligned(64), aligned(64)
    launch(kernel, (3,), (x, None), (7, 0.5), (64, True), 4, GPU)
    launch(kernel, (5, 2), (y, None), (9, 0.25), (64, True), 4, GPU)
    assert kernel.bound == [((3,), (x, None, 7, 0.5, 64, True), 4)]
    expected = (5, 2, 1, "stream of 0", "function", "packed", None, None, None, y.data_ptr(), None, 9, 0.25, 64, True)
    assert kernel.compiled.runs == [expected]


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": (aligned(64, dtype=torch.float16), None)},
        {"tensors": (aligned(64), aligned(64))},
        {"tensors": (aligned(64)[1:], None)},
        {"numbers": (2**31,)},
        {"numbers": (-(2**31),)},
        {"numbers": (7.0,)},
        {"constants": (32,)},
        {"num_warps": 8},
        {"where": torch.device("cuda", 1)},
        {"where": torch.device("cpu")},
        {"kernel": Kernel()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_else_binds_anew(launch, change):
    usual = {
        "kernel": Kernel(), "grid": (3,), "tensors": (aligned(64), None), "numbers": (7,), "constants": (64,),
        "num_warps": 4, "where": GPU,
    }  # fmt: skip
    launch(**usual)
    launch(**usual | change)
    bound = usual["kernel"].bound + (change["kernel"].bound if "kernel" in change else [])
    assert len(bound) == 2
    assert not usual["kernel"].compiled.runs


def test_what_was_compiled_is_forgotten_in_time(launch):
    kernel, x = Kernel(), aligned(64)
    with mock.patch.object(triton_relaunch, "_compiled", {}) as known:
        for i in range(triton_relaunch._MAX_COMPILED + 3):
            launch(kernel, (1,), (x,), (), (i,), 4, GPU)
        assert len(known) == 3


def test_a_listener_hears_of_every_launch(launch):
    kernel, x = Kernel(), aligned(64)
    launch(kernel, (3,), (x,), (), (), 4, GPU)
    with mock.patch.object(triton_replay, "may_replay", return_value=False):
        launch(kernel, (3,), (x,), (), (), 4, GPU)
    assert len(kernel.bound) == 2


def by_both(function):
    """The result by PyTorch, and three times by the kernels."""
    found = []
    for name in ("torch", "triton", "triton", "triton"):
        with use_backend(name):
            found.append(function())
    return found


def test_positions_and_lengths_may_change(device):
    cos, sin = (normal(64, 8, dtype=torch.float32, device=device, seed=i) for i in range(2))
    for seqlen, offset in ((5, 0), (5, 1), (16, 3), (1, 40), (1, 41)):
        x = normal(2, seqlen, 3, 16, dtype=torch.float32, device=device)
        expected, *found = by_both(lambda x=x, offset=offset: apply_rotary(x, cos, sin, seqlen_offsets=offset))
        for y in found:
            torch.testing.assert_close(y, expected)


def test_tensors_may_lie_anywhere(device):
    weight = normal(48, dtype=torch.float32, device=device)
    wide = normal(8, 64, dtype=torch.float32, device=device)
    for x in (wide[:, :48], wide[:, 1:49], wide[:3, :48], wide[:3, 3:51]):
        expected, *found = by_both(lambda x=x: norm_forward(x, weight, None, 1e-5, is_rms_norm=True)[0])
        for y in found:
            torch.testing.assert_close(y, expected)


def test_a_label_to_ignore_may_be_wider_than_32_bits(device):
    logits, labels = normal(3, 40, dtype=torch.float32, device=device), torch.tensor([1, 2**40, 2], device=device)
    for ignore_index in (-100, 2**40):
        expected, *found = by_both(lambda i=ignore_index: cross_entropy(logits, labels, ignore_index=i)[0])
        for losses in found:
            torch.testing.assert_close(losses, expected)
