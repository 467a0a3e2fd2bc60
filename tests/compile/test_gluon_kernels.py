"""Every row of the Hopper tables compiles to what its reason says, as the launcher would launch it."""

import weakref

import pytest
import torch
from gluon_harness import HOPPER, HopperReport, between_waits, inspect
from harness import SHARED_MEMORY, Launch, compile_launch, device_of, recorded, report

from flash_attn_plus.backends import gluon_backward, gluon_launch
from flash_attn_plus.backends.gluon_hopper import GluonHopper
from flash_attn_plus.kernels.gluon import backward as backward_kernels
from flash_attn_plus.kernels.gluon import backward_dq as dq_kernels
from flash_attn_plus.kernels.gluon import backward_ends as ends_kernels
from flash_attn_plus.kernels.gluon import backward_wide as wide_kernels
from flash_attn_plus.kernels.gluon import forward as forward_kernels
from flash_attn_plus.problem import AttentionInputs, describe
from flash_attn_plus.testing import Case
from flash_attn_plus.tuning import hopper

PREPARE = "attention_prepare_kernel"
KINDS = ("full", "causal", "packed_window")
# Softcap and ALiBi take registers that the other kernels need for tiles: local memory accesses a step.
MODIFIED = {
    (64, "causal_softcap"): 56,
    (64, "causal_alibi"): 44,
    (128, "causal_alibi"): 12,
    (256, "causal_softcap"): 32,
}
OTHERS = {"64 long": ("full", "packed"), "64 tall": (*KINDS, "causal_softcap")}
ROWS = [(name, kind) for name in hopper.FORWARD for kind in OTHERS.get(name, KINDS)]


def launches(
    head_dim: int, kind: str, length: int = 512, dtype: torch.dtype = torch.bfloat16, is_deterministic: bool = False
) -> dict[str, Launch]:
    """The launches of a forward and a backward pass, by kernel name."""
    q, k = torch.empty(2, length, 8, head_dim, dtype=dtype), torch.empty(2, length, 2, head_dim, dtype=dtype)
    left, right, cu = 100 if kind == "packed_window" else -1, -1 if kind in ("full", "packed") else 0, None
    more = {"causal_softcap": {"softcap": 30.0}, "causal_alibi": {"alibi_slopes": torch.ones(8)}}.get(kind, {})
    if "packed" in kind:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        cu = torch.tensor([0, 300, 2 * length], dtype=torch.int32)
    inputs = AttentionInputs(q, k, k, head_dim**-0.5, cu_seqlens_q=cu, cu_seqlens_k=cu, **more)
    lse = torch.empty(q.shape[-2], q.shape[0]) if cu is not None else torch.empty(2, 8, length)
    problem = describe(inputs, length, length, left, right, is_deterministic=is_deterministic)
    with (
        recorded(forward_kernels, ("attention_forward_kernel",), HOPPER) as found,
        recorded(backward_kernels, ("attention_backward_kernel",), HOPPER) as main,
        recorded(wide_kernels, ("attention_backward_wide_kernel",), HOPPER) as wide,
        recorded(dq_kernels, ("attention_backward_dq_kernel",), HOPPER) as dq,
        recorded(ends_kernels, (PREPARE,), HOPPER) as ends,
    ):
        gluon_launch.forward(problem, inputs, q, lse)
        given = inputs, q, q, lse, None, q, k, k
        gluon_backward.BackwardPlan(problem, *given)(*given, torch.empty_like(lse))
    return {launch.kernel.__name__: launch for launch in (*found, *main, *wide, *dq, *ends)}


def local_accesses(loop: list[str]) -> int:
    return sum("LDL" in line or "STL" in line for line in loop)


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_forward_rows_overlap_softmax_and_products(name, kind, monkeypatch):
    tile = hopper.FORWARD[name]
    if "tall" in name:
        for limit, value in (("MANY", 0), ("MOST", 2), ("MOST_CAUSAL", 2)):
            monkeypatch.setattr(hopper, limit, value)
    length = hopper.LONG if "long" in name else 512
    found = inspect(launches(int(name.split()[0]), kind, length)["attention_forward_kernel"])
    assert found.shared <= SHARED_MEMORY[HOPPER]
    assert not found.warnings
    assert {tile.consumer_registers, tile.producer_registers} <= found.register_caps
    assert "UTMALDG" in found.assembly
    assert "UTMASTG" in found.assembly
    assert len(found.loops) == tile.consumers
    barriers = 6 + tile.key_stages + tile.value_stages + tile.consumers * tile.has_turns
    assert barriers <= 16, "a processor has 16 hardware barriers"
    for loop in found.loops:
        if tile.frees_early:
            assert tile.has_turns or tile.consumers == 4, "no other warpgroup's products run beside the softmax"
            last = max(i for i, line in enumerate(loop) if "WARPGROUP.DEPBAR" in line)
            assert sum("MUFU.EX2" in line for line in loop[last:]) >= tile.block_n // 2, "V is released late"
        else:
            assert between_waits(loop, "MUFU.EX2") >= tile.block_n // 2, "the wait for P V moved above the softmax"
        products = [i for i, line in enumerate(loop) if "HGMMA" in line]
        scalings = sum("FMUL" in line for line in loop[products[0] : products[-1]])
        assert scalings >= int(name.split()[0]) // 2, "o is scaled before the scores' product, not under it"
        assert local_accesses(loop) <= tile.spills, "registers spill in the main loop"


MANY = Case(batch=32, seqlen_q=512, seqlen_k=512, heads=32, heads_k=32, head_dim=64)


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, "64 tall"),
        ({"right": 0, "seqlen_q": 8192, "seqlen_k": 8192}, "64 tall"),
        ({"right": 0, "seqlen_q": 16384, "seqlen_k": 16384}, "64 long"),
        ({"right": 0, "seqlen_k": 4096}, "64 tall"),
        ({"right": 0, "seqlen_k": 8192}, "64 long"),
        ({"seqlen_q": 2048, "seqlen_k": 2048}, "64 long"),
        ({"left": 100, "seqlen_q": 4096, "seqlen_k": 4096}, "64 tall"),
        ({"softcap": 30.0, "seqlen_q": 4096, "seqlen_k": 4096}, "64 tall"),
        ({"alibi": "batch"}, "64"),
        ({"seqlen_q": 192}, "64 tall"),
        ({"seqlen_q": 128}, "64"),
        ({"seqlen_q": 640}, "64"),
        ({"seqlen_q": 640, "seqlen_k": 640, "right": 0}, "64 tall"),
        ({"seqlen_q": 320, "seqlen_k": 320, "right": 0}, "64"),
        ({"batch": 5}, "64"),
        ({"batch": 5, "right": 0}, "64 tall"),
        ({"batch": 3, "right": 0}, "64"),
        ({"head_dim": 128}, "128"),
    ],
)
def test_rows_serve_what_they_are_for(changes, row):
    problem = MANY._replace(**changes).problem(torch.bfloat16)
    tile = hopper.forward_tile(problem)
    assert tile is hopper.FORWARD[row]
    assert (hopper.forward_cache(problem, tile) == hopper.CACHE) == ("tall" in row or problem.seqlen_k > hopper.SHORT)


@pytest.mark.parametrize(("length", "right", "row"), [(200, 0, "64 tall"), (150, 0, "64"), (300, -1, "64")])
def test_rows_of_packed_sequences_depend_on_their_average(length, right, row):
    lengths = (1000, *[(32 * length - 1000) // 31] * 31)
    problem = MANY._replace(lengths_q=lengths, lengths_k=lengths, right=right).problem(torch.bfloat16)
    assert hopper.forward_tile(problem, sum(lengths) / 32) is hopper.FORWARD[row]


def held(launch: Launch, registers: set[int], loops: int, spills: int) -> HopperReport:
    """What became of a kernel of the backward pass, after what holds of each."""
    found = inspect(launch)
    assert found.shared <= SHARED_MEMORY[HOPPER]
    assert not found.warnings
    assert registers <= found.register_caps
    assert "UTMALDG" in found.assembly
    assert "UTMASTG" in found.assembly
    assert len(found.loops) == loops
    for loop in found.loops:
        assert local_accesses(loop) <= spills, "registers spill in the main loop"
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [d for d, tile in hopper.BACKWARD.items() if not tile.is_wide])
def test_backward_rows_keep_gradients_in_registers(head_dim, kind):
    tile = hopper.BACKWARD[head_dim]
    launch = launches(head_dim, kind, 8192)["attention_backward_kernel"]
    found = held(launch, {tile.consumer_registers, tile.other_registers}, 2, tile.spills)
    is_split = kind == "packed_window"  # whose rows see few keys
    assert ("UTMAREDG" in found.assembly) != is_split
    for loop in found.loops:
        assert sum("MUFU.EX2" in line for line in loop) == tile.block_m // 2


@pytest.mark.parametrize("kind", KINDS)
def test_wide_backward_splits_dv_and_dk(kind):
    tile = hopper.BACKWARD[256]
    launch = launches(256, kind)["attention_backward_wide_kernel"]
    found = held(launch, {tile.consumer_registers, tile.other_registers}, 2, tile.spills)
    assert sorted(sum("MUFU.EX2" in line for line in loop) for loop in found.loops) == [0, 32]


@pytest.mark.parametrize(("head_dim", "kind"), [(64, "full"), (128, "causal"), (128, "packed_window"), (256, "causal")])
def test_dq_rows_keep_dq_in_registers(head_dim, kind):
    tile = hopper.DQ[head_dim]
    found = launches(head_dim, kind, 8192, is_deterministic=True)
    launch = found["attention_backward_dq_kernel"]
    for loop in held(launch, {tile.consumer_registers, tile.producer_registers}, 2, tile.spills).loops:
        assert between_waits(loop, "MUFU.EX2") >= tile.block_n // 2, "the wait for dP moved above the exponentials"


@pytest.mark.parametrize(("head_dim", "kind"), MODIFIED)
def test_modified_scores_keep_the_tiles(head_dim, kind):
    found = launches(head_dim, kind, 2048)
    tile = hopper.FORWARD[str(head_dim)]
    forward = found.pop("attention_forward_kernel")
    held(forward, {tile.consumer_registers, tile.producer_registers}, tile.consumers, spills=8)
    del found[PREPARE]
    for launch in found.values():
        held(launch, set(), 2, MODIFIED[head_dim, kind])


@pytest.mark.parametrize("page_size", [0, 128])
def test_caches_are_read_by_the_copy_engine(page_size):
    tile = hopper.FORWARD["128"]
    q, cache = torch.empty(2, 512, 8, 128, dtype=torch.bfloat16), torch.empty(8, 128, 2, 128, dtype=torch.bfloat16)
    table, used = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    if not page_size:
        cache, table = cache.view(2, 512, 2, 128), None
    inputs = AttentionInputs(q, cache, cache, 0.1, seqused_k=used, block_table=table)
    with recorded(forward_kernels, ("attention_forward_kernel",), HOPPER) as found:
        gluon_launch.forward(describe(inputs, 512, 512, -1, 0), inputs, q, torch.empty(2, 8, 512))
    held(found[0], {tile.consumer_registers, tile.producer_registers}, tile.consumers, tile.spills)


def test_as_many_heads_of_keys_take_turns_however_many_queries_share_them():
    """The fewer take turns, the longer are the last tiles, which a group makes longer already."""
    launch = launches(128, "causal", 8192)["attention_backward_kernel"]
    assert launch.args[launch.kernel.arg_names.index("group")] == 4
    assert launch.args[launch.kernel.arg_names.index("chunk")] == hopper.CACHE // (8192 * 128 * 8)


@pytest.mark.parametrize(
    ("head_dim", "length", "band", "is_deterministic", "expected"),
    [
        (128, 128, (-1, -1), False, True),
        (128, 256, (-1, -1), False, False),
        (128, 256, (-1, 0), False, True),
        (128, 8192, (100, 0), False, True),
        (128, 8192, (-1, 0), False, False),
        (128, 8192, (-1, 0), True, True),
        (64, 256, (-1, 0), False, True),
        (64, 256, (-1, -1), False, False),
        (64, hopper.MOST_SUMMED, (-1, 0), False, True),
        (256, 8192, (-1, -1), False, True),
    ],
)
def test_dq_has_its_own_kernel_where_that_is_faster_or_asked_for(head_dim, length, band, is_deterministic, expected):
    x = torch.empty(1, length, 1, head_dim, dtype=torch.bfloat16)
    inputs = AttentionInputs(x, x, x, 1.0)
    problem = describe(inputs, length, length, *band, is_backward=True, is_deterministic=is_deterministic)
    assert hopper.is_split(problem) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_backward_passes_are_prepared_16_bytes_at_a_time(kind):
    for head_dim in (64, 128):
        launch = launches(head_dim, "causal" if kind == "packed_window" else kind, 8192)[PREPARE]
        found = report(compile_launch(launch, HOPPER))
        assert found.spills == 0
        assert "LDG.E.128" in found.assembly
        assert ".U16" not in found.assembly


class Known:
    """In the place of a kernel and of what it compiles to: keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def launch(*args, num_warps=None, **constants):
            self.launches.append((grid, (*args, *constants.values())))
            return self

        return launch


@pytest.mark.parametrize("is_proven", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_later_launches_pass_what_the_first_one_did(monkeypatch, kind, is_proven):
    kernel = Known()
    monkeypatch.setattr("flash_attn_plus.backends.triton_replay.IS_PROVEN", is_proven)
    monkeypatch.setattr(forward_kernels, "attention_forward_kernel", kernel)
    monkeypatch.setattr("flash_attn_plus.device.probe", lambda where: device_of(HOPPER))
    q, left, cu = torch.empty(2, 512, 8, 128, dtype=torch.bfloat16), -1, None
    if kind == "packed_window":
        q, left, cu = q.flatten(0, 1), 100, torch.tensor([0, 300, 1024], dtype=torch.int32)
    inputs = AttentionInputs(q, q[..., ::4, :], q[..., ::4, :], 0.1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    problem = describe(inputs, 512, 512, left, -1 if kind == "full" else 0)
    plan = GluonHopper().plan_forward(problem, inputs)
    for _ in range(2):
        plan(inputs, torch.empty_like(q), torch.empty(2, 8, 512))
    (first_grid, first), (grid, later) = kernel.launches
    assert grid == first_grid
    for descriptor, tiles in zip(first[:4], later[:4], strict=True):
        assert (descriptor.shape, descriptor.strides) == (tiles.shape, tiles.strides)
        assert descriptor.padding == tiles.padding
        assert is_proven or type(tiles) is type(descriptor)  # an unknown launcher may want more of it
    assert [x.base is q for x in (first[0], later[0])] == [True, True]
    same = [a is b or a == b for a, b in zip(first[5:], later[5:], strict=True)]
    assert all(same)


def named(argument: object, names: dict[int, str]) -> object:
    """An argument of a launch that another call's may equal; of a descriptor all but what only compilation reads."""
    if isinstance(argument, torch.Tensor):
        return names.get(argument.data_ptr(), argument.numel())
    if hasattr(argument, "base"):
        return named(argument.base, names), list(argument.shape), list(argument.strides), argument.padding
    return argument


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_later_backward_passes_launch_the_same_of_other_tensors(monkeypatch, kind, head_dim, is_deterministic):
    kernel, length, passes, watched = Known(), 2200, [], []
    modules = (backward_kernels, "attention_backward_kernel"), (wide_kernels, "attention_backward_wide_kernel")
    for module, name in (*modules, (dq_kernels, "attention_backward_dq_kernel"), (ends_kernels, PREPARE)):
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr("flash_attn_plus.device.probe", lambda where: device_of(HOPPER))
    is_packed, right, plan = kind == "packed_window", -1 if kind == "full" else 0, None
    for _ in range(3):
        q = torch.empty(1, length, 8, head_dim, dtype=torch.bfloat16)
        k, cu = torch.empty(1, length, 2, head_dim, dtype=torch.bfloat16), None
        lse = torch.empty(8, length) if is_packed else torch.empty(1, 8, length)
        if is_packed:
            q, k, cu = q[0], k[0], torch.tensor([0, 300, length], dtype=torch.int32)
        x = AttentionInputs(q, k, k.clone(), 0.1, cu_seqlens_q=cu, cu_seqlens_k=cu)
        given = x, q.clone(), q.clone(), lse, None, q.clone(), k.clone(), k.clone(), lse.clone()
        if plan is None:
            left = 100 if is_packed else -1
            problem = describe(x, length, length, left, right, is_backward=True, is_deterministic=is_deterministic)
            plan = GluonHopper().plan_backward(problem, *given[:-1])
        plan(*given)
        tensors = [t for t in (*x, *given[1:]) if isinstance(t, torch.Tensor)]
        names = {t.data_ptr(): f"tensor {i}" for i, t in enumerate(tensors)}
        passes.append([(grid, [named(a, names) for a in args]) for grid, args in kernel.launches])
        watched += map(weakref.ref, tensors)
        kernel.launches.clear()
    assert len(passes[0]) == 2 + hopper.is_split(problem)
    assert passes[1] == passes[0]
    assert passes[2] == passes[0]
    del q, k, lse, cu, x, given, tensors
    assert [t for t in watched if t() is not None] == []


def test_constants_come_in_the_order_of_the_kernels_parameters():
    found = launches(128, "causal")
    for launch in found.values():
        constants = [name for name in launch.options if name != "num_warps"]
        assert launch.kernel.arg_names[-len(constants) :] == constants
        assert len(launch.args) + len(constants) == len(launch.kernel.arg_names)
