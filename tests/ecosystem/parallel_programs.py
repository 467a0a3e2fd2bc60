"""Sequence-parallel attention of other packages, as processes run it: each rank checks its share of the whole.

Everything is bfloat16: both packages compute wrong float32 gradients, for which they are to blame, since the buffer in
which they accumulate is then the one that the next block's gradients are written into.
"""

import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from language_models import VOCABULARY, admit_cpu, decoder
from programs import operator_calls
from torch import Tensor

from flash_attn_plus.testing import Call, Case, assert_close, make_inputs, run_reference

CASE = Case(2, 48, 48, 4, 2, 16)
LENGTHS = (16, 8, 24)  # each divides by twice the number of ranks
Take = Callable[[Tensor], Tensor]


class Whole(NamedTuple):
    """A call that every rank knows, and what it should give in float64 and in plain bfloat16."""

    call: Call
    expected: dict[str, Tensor]
    eager: dict[str, Tensor]


def whole(**options) -> Whole:
    call = make_inputs(CASE._replace(**options), torch.bfloat16)
    references = (run_reference(call, dtype, with_gradients=True) for dtype in (torch.float64, torch.bfloat16))
    return Whole(call, *references)


def hold(it: Whole, take: Take, attend: Callable[..., Tensor]) -> None:
    """attend(q, k, v) of this rank's share, which take(x) cuts out of a whole tensor, to the tolerance rule."""
    leaves = [take(x).detach().clone().requires_grad_() for x in it.call.inputs[:3]]
    with operator_calls() as calls:
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, take(it.call.dout))
    assert any("forward" in name for name in calls), calls
    assert any("backward" in name for name in calls), calls
    for name, actual in zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True):
        assert_close(name, actual, take(it.expected[name]), take(it.eager[name]))


def contiguous(rank: int, world: int, dim: int) -> Take:
    return lambda x: x.chunk(world, dim)[rank]


def zigzag(rank: int, world: int, dim: int) -> Take:
    """The rank's piece from the front and its piece from the back."""
    return lambda x: torch.cat([x.chunk(2 * world, dim)[i] for i in (rank, 2 * world - 1 - rank)], dim)


def stripe(rank: int, world: int, dim: int) -> Take:
    return lambda x: x[:, rank::world]


def each_sequence(take: Take) -> Take:
    """`take` for every one of the packed sequences."""
    return lambda x: torch.cat([take(part) for part in x.split(LENGTHS)])


def ring_flash_attn(rank: int, world: int) -> None:
    """Rings over dense batches, with every layout that the package has."""
    import ring_flash_attn as package

    for name, layout, is_causal in (
        ("ring", contiguous, False),
        ("ring", contiguous, True),
        ("zigzag_ring", zigzag, True),
        ("stripe", stripe, True),
    ):
        attend = getattr(package, f"{name}_flash_attn_func")
        hold(
            whole(right=0 if is_causal else -1),
            layout(rank, world, 1),
            lambda q, k, v, attend=attend, is_causal=is_causal: attend(q, k, v, causal=is_causal),
        )


def ring_flash_attn_varlen(rank: int, world: int) -> None:
    """Rings over packed sequences, each of which every rank has a share of."""
    import ring_flash_attn as package

    it = whole(lengths_q=LENGTHS, lengths_k=LENGTHS, right=0)
    starts, longest = it.call.inputs.cu_seqlens_q // world, max(LENGTHS) // world
    for name, layout in (("ring", contiguous), ("zigzag_ring", zigzag)):
        attend = getattr(package, f"{name}_flash_attn_varlen_func")
        hold(
            it,
            each_sequence(layout(rank, world, 0)),
            lambda q, k, v, attend=attend: attend(q, k, v, starts, longest, causal=True),
        )


def ring_flash_attn_llama3(rank: int, world: int) -> None:
    """Keys gathered by groups of heads; sequences may end anywhere."""
    import ring_flash_attn as package

    lengths = (5, 30, 13)
    for is_causal in (False, True):
        it = whole(lengths_q=lengths, lengths_k=lengths, right=0 if is_causal else -1)
        prepared = package.llama3_flash_attn_prepare_cu_seqlens(it.call.inputs.cu_seqlens_q, is_causal, rank, world)
        *sequences, keys = prepared

        def attend(q, k, v, sequences=sequences, keys=keys, is_causal=is_causal):
            return package.llama3_flash_attn_varlen_func(
                q, k, v, *sequences, heads_k_stride=1, local_k_slice=keys, causal=is_causal
            )

        hold(it, contiguous(rank, world, 0), attend)


def ring_flash_attn_in_transformers(rank: int, world: int) -> None:
    """A Llama whose attention the package replaces: logits of this rank's tokens against the serial eager model."""
    import ring_flash_attn as package

    trio = decoder("llama", torch.bfloat16)
    ids = torch.randint(2, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(1))
    lengths = (5, 30, 13)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    take = contiguous(rank, world, 1)
    with torch.no_grad():
        expected, eager = (
            torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
            for model in (trio.reference, trio.eager)
        )
        package.substitute_hf_flash_attn(dist.group.WORLD, heads_k_stride=1)
        starts = torch.tensor([0, 5, 35, 48], dtype=torch.int32)
        package.update_ring_flash_attn_params(starts, dist.group.WORLD)
        with operator_calls() as calls:
            actual = trio.flash(take(ids), position_ids=take(positions), use_cache=False).logits
    assert calls["forward packed"] == 2 * 2, calls  # layers, and key heads, which are gathered one by one
    assert_close("logits", actual, take(expected), take(eager))


def yunchang(rank: int, world: int) -> None:
    """Heads exchanged inside groups of ranks, and rings across them."""
    import yunchang as package
    from yunchang.kernels import AttnType

    for ulysses in (1, 2) if world == 4 else (1,):
        ring = world // ulysses
        package.set_seq_parallel_pg(ulysses, ring, rank, world)
        for layout, is_causal in (("basic", False), ("basic", True), ("zigzag", True), ("strip", True)):
            extract = package.EXTRACT_FUNC_DICT[layout]

            def take(x, extract=extract, ulysses=ulysses, ring=ring):
                return extract(x, rank, world_size=world, rd=ring, ud=ulysses).contiguous()

            layer = package.LongContextAttention(ring_impl_type=layout, attn_type=AttnType.FA)
            hold(
                whole(right=0 if is_causal else -1),
                take,
                lambda q, k, v, layer=layer, is_causal=is_causal: layer(q, k, v, causal=is_causal),
            )


def yunchang_ulysses(rank: int, world: int) -> None:
    """Heads exchanged among all ranks, so that each one calls our public function, here with a window."""
    import yunchang as package
    from yunchang.kernels import AttnType

    layer = package.UlyssesAttention(dist.group.WORLD, attn_type=AttnType.FA)
    it = whole(heads=8, heads_k=4, right=0, left=7)
    hold(it, contiguous(rank, world, 1), lambda q, k, v: layer(q, k, v, causal=True, window_size=(7, 0)))


RING = (ring_flash_attn, ring_flash_attn_varlen, ring_flash_attn_llama3, ring_flash_attn_in_transformers)
YUNCHANG = (yunchang, yunchang_ulysses)


def run(rank: int, world: int, programs: tuple[Callable, ...], store: str, results: str) -> None:
    """Run programs on this rank and write what went wrong, by name, for the parent process."""
    torch.set_num_threads(1)
    admit_cpu()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    failures = {}
    for program in programs:
        try:
            program(rank, world)
        except (AssertionError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
            failures[program.__name__] = traceback.format_exc()
        dist.barrier()
    torch.save(failures, f"{results}.{rank}")
    dist.destroy_process_group()
