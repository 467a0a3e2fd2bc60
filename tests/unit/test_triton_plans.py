"""The portable kernels' plans launch again what they bound once, and bind anew where that would not be the same."""

import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from triton.runtime.errors import OutOfResources

from flash_attn_plus import device
from flash_attn_plus.backends import triton_launch, triton_replay
from flash_attn_plus.backends.triton_portable import TritonPortable
from flash_attn_plus.kernels.triton import backward as backward_kernels
from flash_attn_plus.kernels.triton import forward as forward_kernels
from flash_attn_plus.problem import AttentionInputs, describe

GPU = torch.device("cuda", 0)
KERNELS = (
    (forward_kernels, "attention_forward_kernel"),
    (backward_kernels, "attention_statistics_kernel"),
    (backward_kernels, "attention_backward_dkdv_kernel"),
    (backward_kernels, "attention_backward_dq_kernel"),
)
KINDS = {
    "pointers": {"length": 100, "head_dim": 64},
    "descriptors": {"length": 600, "head_dim": 64},
    "ahead": {"length": 600, "head_dim": 128},
    "split": {"length": 600, "head_dim": 256},
    "packed": {"length": 100, "head_dim": 64, "is_packed": True},
}


class Compiled:
    """Stands for Triton's CompiledKernel and for its launcher; notes its launches."""

    function, packed_metadata, run = "function", "packed", None

    def __init__(self):
        self.launches = []
        self.run = SimpleNamespace(
            global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=False,
            launch=lambda *arguments: self.launches.append(arguments),
        )  # fmt: skip


class Kernel:
    """Stands for a kernel; notes the launches that bind arguments."""

    def __init__(self):
        self.bound, self.compiled, self.fails_at = [], Compiled(), None

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.bound.append((grid, arguments))
            if len(self.bound) == self.fails_at:
                raise OutOfResources(2, 1, "shared memory")
            return self.compiled

        return launch


@pytest.fixture
def kernels(monkeypatch):
    """The kernels' stand-ins, on what passes for a Hopper GPU under the Triton that launches are proven for."""
    found = [Kernel() for _ in KERNELS]
    for (module, name), kernel in zip(KERNELS, found, strict=True):
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(device, "probe", lambda where: device.Device("cuda90", 232448, 132))
    monkeypatch.setattr(triton_replay, "IS_PROVEN", True)
    monkeypatch.setattr(triton_replay, "CompiledKernel", Compiled)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: f"stream of {index}", raising=False)
    triton_launch.forget_fitting()
    yield found
    triton_launch.forget_fitting()


def tensors(length: int, head_dim: int, is_packed: bool = False):
    """Inputs, and what the two passes get beside them."""
    q, k, cu = torch.empty(1, length, 4, head_dim, dtype=torch.bfloat16), None, None
    k = torch.empty(1, length, 2, head_dim, dtype=torch.bfloat16)
    lse = torch.empty(1, 4, length)
    if is_packed:
        q, k, lse, cu = q[0], k[0], lse[0], torch.tensor([0, 30, length], dtype=torch.int32)
    x = AttentionInputs(q, k, k.clone(), 0.1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    return x, (q.clone(), lse), (q.clone(), q.clone(), lse, None, q.clone(), k.clone(), k.clone(), lse.clone())


def plan_of(x: AttentionInputs, length: int, then: tuple | None = None):
    problem = describe(x, length, length, -1, 0, is_backward=then is not None)._replace(device=GPU)
    backend = TritonPortable()
    return backend.plan_forward(problem, x) if then is None else backend.plan_backward(problem, x, *then[:-1])


def plain(argument: object, names: dict[int, str]) -> object:
    """An argument as another call's may equal it: tensors by name, scratch by size, descriptors by all but what only
    compilation reads.
    """
    if isinstance(argument, torch.Tensor):
        return names.get(argument.data_ptr(), "scratch")
    if hasattr(argument, "base"):
        return plain(argument.base, names), argument.shape, argument.strides, argument.padding
    if isinstance(argument, int) and argument > 1 << 20:  # an address
        return names.get(argument, "scratch")
    return argument


def heard(kernels: list[Kernel], names: dict[int, str]) -> tuple[list, list]:
    """What was bound and what was launched again since the last time, without the launcher's own arguments."""
    bound = [(grid[0], [plain(a, names) for a in args]) for k in kernels for grid, args in k.bound]
    again = [(args[0], [plain(a, names) for a in args[13:]]) for k in kernels for args in k.compiled.launches]
    for k in kernels:
        k.bound, k.compiled.launches = [], []
    return bound, again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
def test_later_launches_pass_what_the_first_ones_did(kernels, kind, is_backward):
    plan, rounds, watched = None, [], []
    for _ in range(3):
        x, outputs, then = tensors(**KINDS[kind])
        given = then if is_backward else outputs
        plan = plan or plan_of(x, KINDS[kind]["length"], then if is_backward else None)
        plan(x, *given)
        every = [t for t in (*x, *given) if isinstance(t, torch.Tensor)]
        rounds.append(heard(kernels, {t.data_ptr(): f"tensor {i}" for i, t in enumerate(every)}))
        watched += map(weakref.ref, every)
    (first, nothing), *later = rounds
    assert nothing == []
    assert len(first) == (1 if not is_backward else 4 if kind == "split" else 3)
    assert later == [([], first), ([], first)]
    del x, outputs, then, given, every
    assert [t for t in watched if t() is not None] == []


def test_tiles_that_do_not_fit_are_not_launched_again(kernels):
    kernels[2].fails_at = 2  # the second of two passes
    x, _, then = tensors(**KINDS["split"])
    plan = plan_of(x, KINDS["split"]["length"], then)
    plan(x, *then)
    bound, _ = heard(kernels, {})
    assert len(bound) == 6
    plan(x, *then)
    assert heard(kernels, {}) == ([], [bound[0], *bound[3:]])


@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
def test_unaligned_tensors_bind_anew(kernels, is_backward):
    x, outputs, then = tensors(**KINDS["pointers"])
    given = list(then if is_backward else outputs)
    plan = plan_of(x, 100, then if is_backward else None)
    plan(x, *given)
    heard(kernels, {})
    last = torch.empty(given[1].numel() + 1, dtype=given[1].dtype)[1:].view(given[1].shape)
    plan(x, given[0], last, *given[2:])
    bound, again = heard(kernels, {})
    assert (len(bound), len(again)) == ((3, 0) if is_backward else (1, 0))


def test_a_listener_hears_of_every_launch(kernels):
    x, outputs, then = tensors(**KINDS["pointers"])
    plans = plan_of(x, 100), plan_of(x, 100, then)
    for _ in range(2):
        with mock.patch.object(triton_replay, "may_replay", return_value=False):
            plans[0](x, *outputs)
            plans[1](x, *then)
        bound, again = heard(kernels, {})
        assert (len(bound), len(again)) == (4, 0)
