"""Tensor and sequence parallelism on two processes: the shards give what one process gives."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedMLP, ParallelFusedMLP, RowParallelLinear

WORLD = 2
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")


def _start(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    for check in CHECKS:
        check(rank, dist.group.WORLD)
    dist.destroy_process_group()


def _check_cross_entropy(rank, group):
    torch.manual_seed(0)
    logits = torch.randn(6, 40) * 3
    labels = torch.tensor([0, 39, -100, 20, 19, 7])
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "reduction": "sum"}
    whole, part = logits.clone().requires_grad_(), logits.chunk(WORLD, 1)[rank].clone().requires_grad_()
    expected = CrossEntropyLoss(**options)(whole, labels)
    actual = CrossEntropyLoss(**options, process_group=group)(part, labels)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(part.grad, whole.grad.chunk(WORLD, 1)[rank])


def _check_precomputed_logsumexp(rank, group):
    torch.manual_seed(1)
    logits, labels = torch.randn(4, 10), torch.tensor([0, 9, 4, 5])
    part = logits.chunk(WORLD, 1)[rank].contiguous()
    actual = CrossEntropyLoss(reduction="none", process_group=group)(part, labels, precomputed_lse=part.logsumexp(-1))
    torch.testing.assert_close(actual, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))


def _check_linears(rank, group):
    for sequence_parallel in (False, True):
        torch.manual_seed(2)
        first = torch.nn.Linear(12, 10)  # five units of two: three for rank 0, two for rank 1
        second = torch.nn.Linear(10, 6)
        column = ColumnParallelLinear(12, 10, group, sequence_parallel=sequence_parallel, multiple_of=2)
        row = RowParallelLinear(10, 6, group, sequence_parallel=sequence_parallel, multiple_of=2)
        assert column.out_features == row.in_features == (6, 4)[rank]
        assert (row.bias is not None) == (rank == 0)
        mine = slice(0, 6) if rank == 0 else slice(6, 10)
        with torch.no_grad():
            column.weight.copy_(first.weight[mine])
            column.bias.copy_(first.bias[mine])
            row.weight.copy_(second.weight[:, mine])
            if rank == 0:
                row.bias.copy_(second.bias)
        torch.manual_seed(3)  # the ranks have drawn different amounts by now
        x, dy = torch.randn(8, 12), torch.randn(8, 6)
        whole = x.clone().requires_grad_()
        part = (x.chunk(WORLD)[rank] if sequence_parallel else x).clone().requires_grad_()
        expected, actual = second(first(whole)), row(column(part))
        expected.backward(dy)
        actual.backward(dy.chunk(WORLD)[rank] if sequence_parallel else dy)
        share = (lambda t: t.chunk(WORLD)[rank]) if sequence_parallel else (lambda t: t)
        torch.testing.assert_close(actual, share(expected))
        torch.testing.assert_close(part.grad, share(whole.grad))
        torch.testing.assert_close(column.weight.grad, first.weight.grad[mine])
        torch.testing.assert_close(row.weight.grad, second.weight.grad[:, mine])


def _check_mlp(rank, group):
    for sequence_parallel in (False, True):
        torch.manual_seed(2)
        whole = FusedMLP(8, 16, activation="sqrelu")
        part = ParallelFusedMLP(
            8, 16, activation="sqrelu", process_group=group, sequence_parallel=sequence_parallel, checkpoint_lvl=1
        )
        with torch.no_grad():
            part.fc1.weight.copy_(whole.fc1.weight.chunk(WORLD)[rank])
            part.fc1.bias.copy_(whole.fc1.bias.chunk(WORLD)[rank])
            part.fc2.weight.copy_(whole.fc2.weight.chunk(WORLD, 1)[rank])
            if rank == 0:
                part.fc2.bias.copy_(whole.fc2.bias)
        torch.manual_seed(3)  # the ranks have drawn different amounts by now
        x, dy = torch.randn(4, 8), torch.randn(4, 8)
        a = x.clone().requires_grad_()
        b = (x.chunk(WORLD)[rank] if sequence_parallel else x).clone().requires_grad_()
        whole(a).backward(dy)
        out = part(b)
        out.backward(dy.chunk(WORLD)[rank] if sequence_parallel else dy)
        expected, gradient = whole(a), a.grad
        if sequence_parallel:
            expected, gradient = expected.chunk(WORLD)[rank], gradient.chunk(WORLD)[rank]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(b.grad, gradient)
        torch.testing.assert_close(part.fc1.weight.grad, whole.fc1.weight.grad.chunk(WORLD)[rank])


def _check_refusals(rank, group):
    with pytest.raises(ValueError, match="units of 3"):
        ColumnParallelLinear(4, 10, group, multiple_of=3)
    with pytest.raises(AssertionError, match="process_group"):
        ParallelFusedMLP(8)


CHECKS = (_check_cross_entropy, _check_precomputed_logsumexp, _check_linears, _check_mlp, _check_refusals)


def test_two_processes_equal_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_start, (port,), nprocs=WORLD)  # once for all checks, since starting takes longest
