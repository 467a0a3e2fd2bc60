"""`warmup` compiles what a call will look up, and nothing twice."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("triton")

from flash_attn_plus import InvalidArgument, attention_with_kvcache, cache_append, device, kvcache, ops, selection
from flash_attn_plus.backends.triton_portable import is_interpreted
from flash_attn_plus.cli import ahead, warmup, words
from flash_attn_plus.cli.cache_samples import AppendSample
from flash_attn_plus.cli.main import main
from flash_attn_plus.testing import Case, make_inputs
from flash_attn_plus.tuning.config import TileConfig

pytestmark = pytest.mark.skipif(is_interpreted(), reason="kernels are interpreted")
HOPPER = "cuda:90"
CASE = Case(batch=2, seqlen_q=64, seqlen_k=64, heads=4, heads_k=4, head_dim=32)


def plan(target, text):
    where = ahead.known_target(target)
    return ahead.plan(where, warmup.samples(where, words.read(text, words.MODEL_WORDS)))


def kernels(jobs):
    return {job.kernel for job in jobs}


def test_the_words_of_a_model_come_to_its_kernels():
    assert kernels(plan("cuda:80", "d=64 s=512")) == {"attention_forward_kernel"}
    backward = {"attention_statistics_kernel", "attention_backward_dkdv_kernel", "attention_backward_dq_kernel"}
    assert kernels(plan("cuda:80", "d=64 s=512 train")) == {"attention_forward_kernel"} | backward
    assert len(plan("cuda:80", "d=64 s=512 varlen")) == 2
    split = {"attention_split_kernel", "cache_append_kernel"}
    assert kernels(plan("cuda:80", "d=64 s=512 decode")) == {"attention_forward_kernel"} | split
    assert kernels(plan("cuda:80", "d=64 s=512 decode page=16")) == {"attention_forward_kernel"} | split


def test_hopper_gets_the_kernels_of_both_backends():
    jobs = plan(HOPPER, "h=32 hk=8 d=128 causal s=1..4096 train")
    assert "attention_prepare_kernel" in kernels(jobs)  # gluon's
    assert "attention_backward_dq_kernel" in kernels(jobs)  # the portable ones, for short sequences
    assert "attention_prepare_kernel" not in kernels(plan("cuda:80", "h=32 hk=8 d=128 causal s=1..4096 train"))


BASE = Case(batch=2, seqlen_q=48, seqlen_k=48, heads=4, heads_k=2, head_dim=32)
LOOKED_UP = {
    "causal": BASE._replace(right=0),
    "odd": BASE._replace(seqlen_q=37, seqlen_k=61, left=9, right=3),
    "packed": BASE._replace(lengths_q=(48, 5), lengths_k=(16, 48)),
    "dropout": BASE._replace(dropout_p=0.1, alibi="batch"),
    "decode": BASE._replace(seqlen_q=1, used=(48, 7)),
    "paged": BASE._replace(seqlen_q=1, used=(48, 7), page_size=16, heads=6, heads_k=6),
}


@pytest.mark.parametrize("name", LOOKED_UP)
def test_shapes_without_contents_ask_for_the_kernels_that_real_tensors_ask_for(name):
    case, target, cpu = LOOKED_UP[name], ahead.known_target("cuda:80"), torch.device("cpu")
    passes = (False, True) if case.has_backward else (False,)
    planned = ahead.plan(target, [ahead.Sample("triton", case, torch.float16, p) for p in passes])
    call, backend, found = make_inputs(case, torch.float16), selection.get("triton"), set()
    out, lse = ops.allocate_outputs(call.inputs.q, call.inputs.v, case.lengths_q is not None)
    with ahead.only_compiling(target, lambda *kernel: bool(found.add(kernel))), device.assumed(cpu, target.facts):
        ahead.forget_launches()
        backend.forward(call.problem(), call.inputs, out, lse)
        if case.has_backward:
            grads = [torch.empty_like(x) for x in call.inputs[:3]]
            problem = call.problem(is_backward=True)
            backend.backward(problem, call.inputs, call.dout, out, lse, None, *grads, torch.empty_like(lse))
    assert found == {(job.kernel, job.key) for job in planned}


@pytest.mark.parametrize("is_rotary", [False, True])
@pytest.mark.parametrize("name", ["decode", "paged"])
def test_appends_ask_for_the_kernel_that_real_tensors_ask_for(name, is_rotary, monkeypatch):
    case, target, found = LOOKED_UP[name]._replace(right=0), ahead.known_target("cuda:80"), set()
    planned = ahead.plan(target, [AppendSample(case, torch.float16, is_rotary)])
    call = make_inputs(case, torch.float16)
    x = call.inputs
    new = torch.randn(2, 17, case.heads_k, 32, dtype=torch.float16)
    angles = {"rotary_cos": torch.randn(48, 16).half(), "rotary_sin": torch.randn(48, 16).half()} if is_rotary else {}
    table = None if x.block_table is None else x.block_table.int()
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    for module in (cache_append, kvcache):
        monkeypatch.setattr(module, "uses_triton", lambda _: True)

    def attend(k):
        attention_with_kvcache(x.q, x.k, x.v, k, k, cache_seqlens=lengths, block_table=table, causal=True, **angles)

    cpu = torch.device("cpu")
    with ahead.only_compiling(target, lambda *kernel: bool(found.add(kernel))), device.assumed(cpu, target.facts):
        if not is_rotary:  # the kernel that attends appends a key itself
            attending = selection.get("triton").plan_forward(call.problem(), x)
            monkeypatch.setattr(ops, "plan_forward", lambda *_: attending)
            attend(new[:, :1])
        # Nobody fills the lengths after the append, so nothing can be attended.
        monkeypatch.setattr(ops, "plan_forward", lambda *_: lambda *_: None)
        attend(new)
    assert found == {(job.kernel, job.key) for job in planned}


def test_longer_ranges_need_few_more_kernels():
    assert len(plan("cuda:80", "d=64 causal s=1..16384 h=8")) <= 8


def test_lengths_stand_for_every_way_of_specialising():
    found = warmup.lengths(3, 100)
    assert found[0] == 3
    assert found[-1] == 100
    assert {n % 16 for n in found} >= {0, 1, 2, 4, 8}
    assert {32, 64} <= set(found)
    assert warmup.lengths(7, 7) == [7]


def test_what_was_compiled_is_found_by_the_next_process(compiling_environment):
    command = [sys.executable, "-m", "flash_attn_plus", "warmup", "d=16 h=2 s=64", "--target", "cuda:80", "--json"]

    def run(*more):
        done = subprocess.run([*command, *more], env=compiling_environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    first, second = run("--jobs", "1"), run("--jobs", "1")
    assert (first["compiled"], first["were there"], first["failed"]) == (first["kernels"], 0, [])
    assert (second["compiled"], second["were there"]) == (0, first["kernels"])
    files = [name for _, _, names in os.walk(compiling_environment["TRITON_CACHE_DIR"]) for name in names]
    assert sum(name.endswith(".cubin") for name in files) == first["kernels"]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_processes_compile_side_by_side(cache):
    target = ahead.known_target("hip:gfx942")
    jobs = ahead.plan(target, [ahead.Sample("triton", CASE._replace(right=r), torch.float16) for r in (-1, 0)])
    told = []
    done = ahead.compile_all(jobs, 2, told.append)
    assert len(done) == len(told) == 2
    assert [d.error for d in done] == [None, None]
    assert [d.was_cached for d in done] == [False, False]
    assert all(d.was_cached for d in ahead.compile_all(jobs, 1, told.append))


def test_tiles_that_do_not_fit_are_followed_by_the_next_choice(cache, monkeypatch, tmp_path):
    target = ahead.known_target("cuda:80")
    small = target._replace(facts=target.facts._replace(shared_memory=1024))
    choices = [TileConfig(64, 64, 4, 2)]
    monkeypatch.setattr("flash_attn_plus.tuning.heuristics.forward", lambda *_: choices)
    (job,) = ahead.plan(small, [ahead.Sample("triton", CASE._replace(head_dim=16), torch.float16)])
    assert ahead.compile_job(job).error.startswith("OutOfResources: out of resource: shared memory")
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    choices.append(TileConfig(16, 16, 1, 1))
    assert ahead.compile_job(job).error is None
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


def test_an_interrupt_ends_the_processes_and_leaves_the_telling_to_this_one():
    before = signal.getsignal(signal.SIGINT)
    with ahead._without_interrupts():
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        child.start()
    assert signal.getsignal(signal.SIGINT) is before
    os.kill(child.pid, signal.SIGINT)  # as a terminal does, which tells every process of the command
    child.join(0.2)
    assert child.is_alive()
    ahead._end_children(RuntimeError)
    assert child.is_alive()
    ahead._end_children(KeyboardInterrupt)
    child.join(30)
    assert child.exitcode == -signal.SIGTERM


def test_nothing_stays_changed(cache):
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def state():
        return JITFunction.run, knobs.runtime.jit_cache_hook, driver._active, torch.cuda.is_available

    before = state()
    plan(HOPPER, "d=64 s=2048")
    with pytest.raises(InvalidArgument):
        plan(HOPPER, "dtype=fp64 s=64")
    assert state() == before


def test_a_list_of_the_kernels_without_compiling(capsys, cache, tmp_path):
    assert main(["warmup", "d=64", "s=512", "--target", "cuda:80", "--dry-run"]) == 0
    assert "attention_forward_kernel  dense  b=64 sq=512 sk=512" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--target", "cuda:91"], "--target cuda:91 is unknown; choose one of cuda:80"),
        (["--target", "cuda:80", "--device", "cpu"], "give one of them"),
        (["--device", "cpu"], "there is nothing to compile here"),
        (["dtype=fp64", "--target", "cuda:80"], "none of our kernels serves this on cuda:80"),
    ],
)
def test_mistakes_get_a_sentence(arguments, why, capsys):
    assert main(["warmup", "s=64", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_under_the_interpreter_there_is_nothing_to_compile(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["warmup", "s=64", "--target", "cuda:80"]) == 2
    assert "interpreted, not compiled; unset it" in capsys.readouterr().err
