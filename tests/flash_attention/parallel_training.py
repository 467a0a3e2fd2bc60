"""Checks that two processes run together: each trains on its share of a batch, the sum is the whole batch's."""

import copy
import traceback

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flash_attention import MultiHeadFlashAttention

WORLD = 2


class Model(nn.Module):
    """Self-attention, then cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MultiHeadFlashAttention(16, 4, 2, causal=True, rotary_dim=4)
        self.second = MultiHeadFlashAttention(16, 4, alibi_slopes=torch.full((4,), 0.2))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, key_padding_mask=keep), x, key_padding_mask=keep)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch, the same in both processes."""
    keep = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [False] * 2 + [True] * 5, [False] * 6 + [True]])
    return torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64), keep


def train(model: nn.Module, x: torch.Tensor, keep: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(x, keep).square().mean().backward()
        optimizer.step()


def compare(wrap) -> None:
    """Parameters after three steps on shares of the batch, against one process with all of it."""
    torch.manual_seed(0)
    alone = Model().double()
    model = wrap(copy.deepcopy(alone))
    train(alone, *batch(), torch.optim.SGD(alone.parameters(), lr=0.5))
    share = (t.chunk(WORLD)[dist.get_rank()] for t in batch())
    train(model, *share, torch.optim.SGD(model.parameters(), lr=0.5))
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    expected = alone.state_dict()
    found = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in inner.state_dict().items()}
    torch.testing.assert_close(found, expected)


def _check_data_parallel() -> None:
    compare(DistributedDataParallel)


def _check_fully_sharded() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))

    def shard(model: Model) -> nn.Module:
        for layer in (model.first, model.second):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    compare(shard)


CHECKS = {"data_parallel": _check_data_parallel, "fully_sharded": _check_fully_sharded}


def run_checks(rank: int, store: str, results: str) -> None:
    """Run every check and write what went wrong, by name, for the parent process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    failures = {}
    for name, function in CHECKS.items():
        try:
            function()
        except (AssertionError, RuntimeError, ValueError, TypeError, KeyError):
            failures[name] = traceback.format_exc()
        dist.barrier()
    torch.save(failures, f"{results}.{rank}")
    dist.destroy_process_group()
