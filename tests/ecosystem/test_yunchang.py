"""yunchang, which calls the private functions and the public one, on 2 and 4 processes."""

import pytest
import torch
from parallel_programs import YUNCHANG, run
from programs import require

require("yunchang")


@pytest.fixture(scope="module", params=[2, 4])
def failures(request, tmp_path_factory) -> list[dict[str, str]]:
    """What went wrong on each rank; all programs run in one group of processes, because starting them takes long."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    torch.multiprocessing.spawn(run, (world, YUNCHANG, str(folder / "store"), str(folder / "results")), nprocs=world)
    return [torch.load(f"{folder / 'results'}.{rank}") for rank in range(world)]


@pytest.mark.parametrize("name", [program.__name__ for program in YUNCHANG])
def test_every_rank(name, failures):
    for rank, failed in enumerate(failures):
        assert name not in failed, f"rank {rank}: {failed[name]}"
