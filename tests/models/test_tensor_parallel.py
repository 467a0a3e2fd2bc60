"""Modules, models and generation spread over two processes give what the serial ones give."""

import pytest
import torch
from parallel_checks import CHECKS, WORLD, run_checks


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, str]]:
    """What went wrong on each rank; all checks run in one pair of processes, because starting them takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_checks, args=(str(folder / "store"), str(folder / "results")), nprocs=WORLD)
    return [torch.load(f"{folder / 'results'}.{rank}") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, failures):
    for rank, failed in enumerate(failures):
        assert name not in failed, f"rank {rank}: {failed[name]}"
