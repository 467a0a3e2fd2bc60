"""`tune` takes the fastest tiles that are right, and the engine uses them afterwards."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from flash_attn_plus import device, env
from flash_attn_plus.backends import triton_portable
from flash_attn_plus.backends.triton_portable import interpreter_lacks, is_interpreted
from flash_attn_plus.cli import output, tune
from flash_attn_plus.cli.main import main
from flash_attn_plus.testing import Case
from flash_attn_plus.tuning import heuristics, table

CPU = torch.device("cpu")
HOPPER = device.Device("cuda90", 227 * 1024, 132)
CASE = Case(batch=1, seqlen_q=32, seqlen_k=32, heads=1, heads_k=1, head_dim=16, right=0)
USES = """
import json, torch
from flash_attn_plus import device
from flash_attn_plus.cli.tune import Bench, Task
from flash_attn_plus.testing import Case
from flash_attn_plus.tuning import heuristics
from flash_attn_plus.tuning.config import TileConfig
case = Case(seqlen_q=32, seqlen_k=32, head_dim=16, right=0)
problem = case.problem(torch.float16)
used = heuristics.forward(problem, device.probe(problem.device))[0]
bench = Bench(Task("dkdv", case, torch.float16), problem.device)
right = bench.wrong(TileConfig(16, 32, 4, 1))
launch = bench._backend.backward
bench._backend.backward = lambda *a: (launch(*a), a[7].mul_(1.1))  # a wrong dk
print(json.dumps([used[:4], right, bench.wrong(TileConfig(16, 32, 4, 1))]))
"""


@pytest.mark.skipif(interpreter_lacks() is not None, reason=str(interpreter_lacks()))
def test_a_search_by_the_interpreter_writes_a_table_that_the_engine_reads(plain_environment, tmp_path):
    environment = {**plain_environment, "TRITON_INTERPRET": "1"}
    path = tmp_path / "tiles.json"
    command = [sys.executable, "-m", "flash_attn_plus", "tune", "--json", "--out", str(path), "--kernels", "forward"]
    command += ["--head-dims", "16", "--lengths", "32", "--bands", "causal", "--dtype", "fp16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [row["kernel"] for row in found["found"]] == ["forward d=16 s=32 causal fp16"]
    entries = table.parse(str(path), path.read_text())
    best = found["found"][0]["best"]
    assert len(entries) == (best != found["found"][0]["built-in"])
    environment[env.TUNING_TABLE] = str(path)
    used = subprocess.run([sys.executable, "-c", USES], env=environment, capture_output=True, text=True, check=True)
    (m, n, warps, stages), right, wrong = json.loads(used.stdout)
    assert f"{m}x{n} w{warps} s{stages}" == best
    assert right is None
    assert wrong.startswith("dk: error")


class Times:
    """Stands for `tune.Bench`: a time for every configuration, and which are wrong."""

    def __init__(self, times, wrong=()):
        self.times, self.bad, self.problem = times, wrong, CASE.problem(torch.float16)

    def __call__(self, _task, _where):
        return self

    def run(self, config, _seconds):
        if config not in self.times:
            raise RuntimeError("out of registers")
        return self.times[config]

    def wrong(self, config):
        return "wrong" if config in self.bad else None


@pytest.fixture
def search(monkeypatch):
    facts = device.Device("interpreter", 1 << 30, 1)
    every = tune.candidates("forward", CASE.problem(torch.float16), facts)

    def run(*args, **kwargs):
        monkeypatch.setattr(tune, "Bench", Times(*args, **kwargs))
        task = tune.Task("forward", CASE, torch.float16)
        with output.Progress("searching", 4) as progress:
            return tune.search(task, CPU, facts, progress)

    return run, every


def test_the_fastest_right_tiles_win(search):
    run, (default, *others) = search
    times = {default: 10.0, others[0]: 4.0, others[1]: 5.0}
    found = run(times)
    assert (found.best, found.gain, found.wrong, found.tried) == (others[0], 2.5, 0, 3)
    found = run(times, wrong=[others[0]])
    assert (found.best, found.gain, found.wrong) == (others[1], 2.0, 1)
    assert run(times, wrong=others).best == default


def test_a_gain_that_does_not_show_changes_nothing(search):
    run, (default, *others) = search
    assert run({default: 10.0, others[0]: 9.95}).best == default


def test_built_in_tiles_that_do_not_run_are_told(search):
    run, (_default, *others) = search
    with pytest.raises(tune.InvalidArgument, match="the built-in tiles do not run"):
        run({others[0]: 1.0})


@pytest.mark.parametrize("kernel", table.KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_candidates_fit_the_device_and_hold_the_built_in_choice_first(kernel, head_dim):
    p = CASE._replace(head_dim=head_dim, seqlen_q=1024, seqlen_k=1024).problem(torch.bfloat16)
    found = tune.candidates(kernel, p, HOPPER)
    assert found[0] == getattr(heuristics, kernel)(p, HOPPER)[0]
    assert len(found) == len(set(found))
    assert len(found) > 4
    size = getattr(heuristics, f"{kernel}_bytes")
    assert all(size(p, c) <= HOPPER.shared_memory for c in found)
    assert {c.by_descriptor for c in found} == {False, found[0].by_descriptor}


def test_a_table_is_extended_and_its_old_choices_replaced(tmp_path):
    path, task = tmp_path / "folder" / "tiles.json", tune.Task("forward", CASE, torch.float16)
    default, other, third = tune.candidates("forward", CASE.problem(torch.float16), device.probe(CPU))[:3]

    def found(best, seqlen):
        return tune.Found(task._replace(case=CASE._replace(seqlen_k=seqlen)), default, best, 2.0, 1.0, 4, 0)

    path.parent.mkdir()
    tune.save(path, [], [found(other, 32), found(other, 64)], "interpreter", CPU)
    known = table.parse("", path.read_text())
    assert [(e.seqlen, e.config) for e in known] == [(32, other), (64, other)]
    tune.save(path, known, [found(third, 64), found(other, 128), found(default, 32)], "interpreter", CPU)
    assert [(e.seqlen, e.config) for e in table.parse("", path.read_text())] == [(64, third), (128, other)]
    assert json.loads(path.read_text())["device"] == tune.device_name(CPU)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter has tiles")
def test_without_an_accelerator_there_is_nothing_to_search(capsys):
    assert main(["tune", "--device", "cpu"]) == 2
    assert "there are no tiles to search on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--kernels", "backward"], "--kernels does not know 'backward'; choose among forward, dkdv, dq"),
        (["--bands", "round"], "--bands does not know 'round'"),
        (["--lengths", "x"], "--lengths needs a positive integer"),
        (["--dtype", "int4"], "--dtype=int4 is no dtype"),
        (["--dtype", "bf16"], "does not serve forward d=64 s=1024 causal bf16: dtype bfloat16"),
        (["--jobs", "0"], "--jobs must be positive"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--dtype", "fp16", "--out", "."], "--out . cannot be written"),
    ],
)
def test_mistakes_get_a_sentence(arguments, why, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_portable, "interpreter_lacks", lambda: None)
    assert main(["tune", "--device", "cpu", *arguments]) == 2
    assert why in capsys.readouterr().err
