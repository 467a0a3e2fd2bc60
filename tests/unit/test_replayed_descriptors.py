"""A launch that is repeated passes the copy engine what Triton's own launcher would, made once for each address."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attn_plus.backends import triton_replay

nvidia = pytest.importorskip("triton.backends.nvidia.driver")
FACT = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, 64], "fp4_padded": False}
SIGNATURE = {0: "*fp16", 1: "tensordesc<fp16[64, 64]>", 2: "i32", 3: "tensordesc<fp16[64, 64]>", 4: "constexpr"}
# What Triton's launchers read, and what they also read from Triton 3.7 on.
RUN = {
    "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0, "profile_scratch_align": 1,
    "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False,
}  # fmt: skip
NEW = {"arg_annotations": "annotations", "kernel_signature": b"signature"}
HAS_NEW = hasattr(nvidia, "annotate_arguments")


@pytest.fixture
def made(monkeypatch):
    """What the driver was asked to make, as a list of addresses; it makes the address's name."""
    found = []

    def fill(address, *layout):
        found.append(address)
        return f"map of {address}"

    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    return found


def launcher_of(launch) -> SimpleNamespace:
    """What Triton's launcher, `launch`, is wrapped in."""
    return SimpleNamespace(launch=launch, **RUN, **(NEW if HAS_NEW else {}))


def replay_of(launch) -> triton_replay.Replay:
    compiled = SimpleNamespace(run=launcher_of(launch), function="function", packed_metadata="packed")
    return triton_replay.Replay(compiled, (3,), ("tail",), torch.device("cuda", 0))


def described(x: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [64, 64])


def as_lists(arguments: tuple) -> list:
    """Kernels' arguments come as a list or a tuple."""
    return [list(x) if isinstance(x, tuple) else x for x in arguments]


def test_maps_are_kept_by_address(made):
    launched = []
    wrapped = nvidia.wrap_handle_tensordesc(lambda *a: launched.append(as_lists(a)), SIGNATURE, [FACT, FACT])
    replay, a, b, c = replay_of(wrapped), *(torch.zeros(128, 64, dtype=torch.float16) for _ in range(3))
    head = (3, 1, 1, 7, "function", "packed", None, None, None)
    for pair, new in (((a, b), 2), ((a, b), 0), ((b, a), 2), ((c, b), 1), ((a, a), 0)):
        arguments = (5, described(pair[0]), 6, described(pair[1]))
        replay(*arguments)
        assert len(made) == new
        nvidia.CudaLauncher.__call__(launcher_of(wrapped), *head, *arguments, "tail")
        assert launched[-2] == launched[-1]
        made.clear()


def test_their_number_is_bounded(made, monkeypatch):
    monkeypatch.setattr(triton_replay, "_MOST_MADE", 4)
    replay = replay_of(nvidia.wrap_handle_tensordesc(lambda *a: None, SIGNATURE, [FACT, FACT]))
    kept = [torch.zeros(128, 64, dtype=torch.float16) for _ in range(9)]
    for x in kept:
        replay(5, described(x), 6, described(kept[0]))
    assert [len(maps) for *_, maps in replay._described] == [1, 1]


@pytest.mark.parametrize("launch", [print, lambda *a: None], ids=["built_in", "function"])
def test_other_launchers_are_called_as_they_are(launch):
    assert triton_replay._bare(launch) == (launch, [])


def test_descriptors_that_code_takes_apart_are_left_to_triton():
    wrapped = nvidia.wrap_handle_tensordesc(print, SIGNATURE, None)
    assert triton_replay._bare(wrapped) == (wrapped, [])
