"""Search the fastest tiles of the portable Triton kernels for this device, and save them as a table (JSON).

The engine uses the table when FLASH_ATTENTION_TUNING_TABLE names it; keep it, share it with others who have the same
device. An existing table is extended. Tiles are kept only where they beat the built-in ones and give right results.
Calls that other backends serve (`gluon` on Hopper, `torch` on the CPU) have no tiles of this kind.
"""

import argparse
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash_attn_plus import device, ops, selection
from flash_attn_plus.backends.triton_portable import is_interpreted
from flash_attn_plus.cli import ahead, measure, output, results, words
from flash_attn_plus.cli.info import processor, versions
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs
from flash_attn_plus.tuning import heuristics, table
from flash_attn_plus.tuning.config import TileConfig

SUMMARY = "search the fastest tiles for this device and save them"
_TOKENS, _FEATURES = 16384, 2048  # of a measured call
_FINALISTS = 3
_WORTH = 1.01  # how much faster tiles must be to be kept
_SIZES = {"forward": heuristics.forward_bytes, "dkdv": heuristics.dkdv_bytes, "dq": heuristics.dq_bytes}
_CHOICES = {"forward": heuristics.forward, "dkdv": heuristics.dkdv, "dq": heuristics.dq}


class Task(NamedTuple):
    """One kernel on one kind of call."""

    kernel: str
    case: Case
    dtype: torch.dtype

    @property
    def is_backward(self) -> bool:
        """Whether the kernel belongs to the backward pass."""
        return self.kernel != "forward"

    @property
    def name(self) -> str:
        """As it is told."""
        band = "causal" if self.case.right == 0 else "full"
        dtype = next(short for short, dtype in words.DTYPES.items() if dtype == self.dtype)
        return f"{self.kernel} d={self.case.head_dim} s={self.case.seqlen_k} {band} {dtype}"


class Found(NamedTuple):
    """The outcome of one task."""

    task: Task
    default: TileConfig
    best: TileConfig
    default_ms: float
    best_ms: float
    tried: int
    wrong: int  # faster ones whose results break the rule

    @property
    def gain(self) -> float:
        """How many times faster the best one is."""
        return self.default_ms / self.best_ms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tune`."""
    parser.add_argument("--out", type=Path, help="the table to write or extend (default: tiles-DEVICE.json, here)")
    parser.add_argument("--device", help="default: the accelerator that PyTorch sees")
    parser.add_argument("--head-dims", default="64,128", help="default 64,128")
    parser.add_argument("--lengths", default="1024,8192", help="sequence lengths (default 1024,8192)")
    parser.add_argument("--bands", default="causal,full", help="causal, full or both (default)")
    parser.add_argument("--kernels", default=",".join(table.KERNELS), help="default forward,dkdv,dq")
    parser.add_argument("--dtype", default="bf16", help="bf16 (default), fp16 or fp32")
    parser.add_argument("--seconds", type=float, default=900.0, help="start no further search after this (default 900)")
    parser.add_argument("--jobs", type=int, help="processes that compile (default: one for each processor)")


def candidates(kernel: str, p, facts: device.Device) -> list[TileConfig]:
    """Every configuration worth a try within the device's shared memory, the built-in choice first."""
    chosen = _CHOICES[kernel](p, facts)[0]
    if facts.family == "interpreter":
        grid: Iterator[tuple[int, int, int, int]] = product((16, 32), (16, 32), (4,), (1,))
    else:
        grid = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    is_split = kernel == "dkdv" and chosen.is_split
    ways = (False, True) if chosen.by_descriptor else (False,)
    every = (TileConfig(*sizes, is_split=is_split, by_descriptor=way) for sizes, way in product(grid, ways))
    fitting = [c for c in every if c != chosen and _SIZES[kernel](p, c) <= facts.shared_memory]
    return [chosen, *fitting]


def tasks(arguments: argparse.Namespace, is_slow: bool) -> list[Task]:
    """What to search, from the arguments."""
    kernels = _listed("--kernels", arguments.kernels, table.KERNELS)
    bands = _listed("--bands", arguments.bands, ("causal", "full"))
    dims = [words.read_count("--head-dims", x) for x in arguments.head_dims.split(",")]
    lengths = [words.read_count("--lengths", x) for x in arguments.lengths.split(",")]
    dtype = words.read_dtype("--dtype", arguments.dtype)
    found = []
    for d, length, band, kernel in product(dims, lengths, bands, kernels):
        batch, heads = (1, 1) if is_slow else (max(1, _TOKENS // length), max(1, _FEATURES // d))
        sizes: dict[str, Any] = {
            "batch": batch,
            "heads": heads,
            "heads_k": heads,
            "head_dim": d,
            "right": 0 if band == "causal" else -1,
        }
        found.append(Task(kernel, Case(seqlen_q=length, seqlen_k=length, **sizes), dtype))
    return found


def _listed(word: str, text: str, known: tuple[str, ...]) -> list[str]:
    for name in text.split(","):
        if name not in known:
            raise InvalidArgument(f"{word} does not know {name!r}; choose among {', '.join(known)}")
    return text.split(",")


class Bench:
    """The tensors of a task, and what runs and checks a configuration on them."""

    def __init__(self, task: Task, where: torch.device):
        self._task, self._where, self._backend = task, where, selection.get("triton")
        c = task.case
        q, dout, k, v = (
            torch.randn(c.batch, c.seqlen_q, heads, c.head_dim, device=where, dtype=task.dtype)
            for heads in (c.heads, c.heads, c.heads_k, c.heads_k)
        )
        self.inputs = ops.AttentionInputs(q, k, v, c.head_dim**-0.5)
        self.problem = ops.describe(self.inputs, 0, 0, c.left, c.right, is_backward=task.is_backward)
        self._out, self._lse = ops.allocate_outputs(q, v, False)
        self._rest = (dout, *(torch.empty_like(x) for x in (q, k, v)), torch.empty_like(self._lse))
        if task.is_backward:
            forward = ops.describe(self.inputs, 0, 0, c.left, c.right)
            self._backend.forward(forward, self.inputs, self._out, self._lse)

    def run(self, config: TileConfig, seconds: float) -> float:
        """Milliseconds of the pass with that configuration; raises what Triton raises when it does not work."""
        dout, dq, dk, dv, delta = self._rest
        with table.only(self._task.kernel, config):
            if self._task.is_backward:
                call = partial(
                    self._backend.backward,
                    self.problem,
                    self.inputs,
                    dout,
                    self._out,
                    self._lse,
                    None,
                    dq,
                    dk,
                    dv,
                    delta,
                )
            else:
                call = partial(self._backend.plan_forward(self.problem, self.inputs), self.inputs, self._out, self._lse)
            call()
            return measure.milliseconds(call, self._where, seconds)

    def wrong(self, config: TileConfig) -> str | None:
        """What is wrong with the results of a configuration on a small case; None when nothing is."""
        length = 45 if self._where.type == "cpu" else 387
        small = self._task.case._replace(batch=1, heads=2, heads_k=1, seqlen_q=length, seqlen_k=length)
        call = make_inputs(small, self._task.dtype, self._where)
        x = call.inputs
        out, lse = (t.fill_(torch.nan) for t in ops.allocate_outputs(x.q, x.v, False))
        grads = {name: torch.full_like(t, torch.nan) for name, t in zip(("dq", "dk", "dv"), x[:3], strict=True)}
        with table.only(self._task.kernel, config):
            self._backend.forward(call.problem(), x, out, lse)
            if self._task.is_backward:
                backward = call.problem(is_backward=True)
                delta = torch.empty_like(lse)
                dq, dk, dv = grads.values()
                self._backend.backward(backward, x, call.dout, out, lse, None, dq, dk, dv, delta)
        try:
            assert_matches_reference(call, {"out": out, "lse": lse} | (grads if self._task.is_backward else {}))
        except AssertionError as error:
            return str(error)
        return None


def search(task: Task, where: torch.device, facts: device.Device, progress: output.Progress) -> Found:
    """Time every candidate, the fastest few again, and take the fastest one that gives right results."""
    from triton.errors import TritonError

    bench = Bench(task, where)
    every = candidates(task.kernel, bench.problem, facts)
    times: dict[TileConfig, float] = {}
    for config in every:
        progress.starts(f"{task.name} {shown(config)}")
        try:
            times[config] = bench.run(config, 0.02)
        except (TritonError, RuntimeError) as error:  # too many registers, an assembler that gives up
            if config == every[0]:
                raise InvalidArgument(f"the built-in tiles do not run for {task.name}: {error}") from error
        progress.advance()
    default, wrong = every[0], 0
    default_ms = bench.run(default, 0.1)
    for config in sorted(times, key=times.__getitem__)[:_FINALISTS]:
        ms = default_ms if config == default else bench.run(config, 0.1)
        if config == default or default_ms / ms < _WORTH:
            continue
        if bench.wrong(config) is None:
            return Found(task, default, config, default_ms, ms, len(times), wrong)
        wrong += 1
    return Found(task, default, default, default_ms, default_ms, len(times), wrong)


def shown(c: TileConfig) -> str:
    """A configuration in short: queries x keys of a tile, warps, stages, and whether tiles come by descriptors."""
    return f"{c.block_m}x{c.block_n} w{c.num_warps} s{c.num_stages}{' descriptors' if c.by_descriptor else ''}"


def compile_ahead(work: list[Task], where: torch.device, facts: device.Device, processes: int) -> None:
    """Compile every candidate in parallel before anything is timed."""
    if where.type == "cpu":
        return
    samples = [
        ahead.Sample("triton", task.case, task.dtype, task.is_backward, tiles=(task.kernel, config))
        for task in work
        for config in candidates(task.kernel, task.case.problem(task.dtype, where, task.is_backward), facts)
    ]
    jobs = ahead.plan(ahead.present_target(where), samples)
    with output.Progress("compiling", len(jobs)) as progress:
        ahead.compile_all(jobs, processes, lambda _done: progress.advance())


def run(arguments: argparse.Namespace) -> int:
    """Search, print what was found, and write the table."""
    where = words.read_device("--device", arguments.device) if arguments.device else words.default_device()
    if where.type == "cpu" and not is_interpreted():
        raise InvalidArgument(
            "there are no tiles to search on the CPU, whose backend is made of PyTorch's own operations; run this on a"
            " machine with an accelerator (TRITON_INTERPRET=1 tunes Triton's interpreter, a test of this command)"
        )
    if arguments.jobs is not None and arguments.jobs < 1:
        raise InvalidArgument(f"--jobs must be positive, not {arguments.jobs}")
    words.check_seconds(arguments.seconds)
    start, facts = time.monotonic(), device.probe(where)
    work = tasks(arguments, where.type == "cpu")
    for task in work:
        if why := selection.get("triton").reasons(task.case.problem(task.dtype, where, task.is_backward)):
            raise InvalidArgument(f"the triton backend does not serve {task.name}: {'; '.join(why)}")
    path = arguments.out or Path(f"tiles-{device_name(where).lower().replace(' ', '-')}.json")
    results.check_output("--out", path)
    known = table.read(str(path)) if path.exists() else []
    compile_ahead(work, where, facts, arguments.jobs or ahead.default_processes())
    total = sum(len(candidates(t.kernel, t.case.problem(t.dtype, where, t.is_backward), facts)) for t in work)
    found: list[Found] = []
    with output.Progress("timing", total) as progress:
        for task in work:
            if time.monotonic() - start > arguments.seconds:
                break
            found.append(search(task, where, facts, progress))
            save(path, known, found, facts.family, where)
    report(arguments.json, path, work, found)
    return 0


def device_name(where: torch.device) -> str:
    """What the device calls itself."""
    return processor() if where.type == "cpu" else words.device_name(where)


def save(path: Path, known: list[table.Entry], found: list[Found], family: str, where: torch.device) -> None:
    """Write the entries that were there, with those found in their place or behind them."""
    entries = {(e.key, e.seqlen): e for e in known}
    for f in found:
        problem = f.task.case.problem(f.task.dtype, where, f.task.is_backward)
        key = table.key_of(f.task.kernel, problem, family)
        entries.pop((key, f.task.case.seqlen_k), None)
        if f.best != f.default:
            entry = table.Entry(key, f.task.case.seqlen_k, f.best, f.best_ms, f.default_ms)
            entries[key, entry.seqlen] = entry
    about = {
        "device": device_name(where),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions(),
    }
    path.write_text(table.render(list(entries.values()), about), encoding="utf-8")


def report(as_json: bool, path: Path, work: list[Task], found: list[Found]) -> None:
    """What was found, what was not reached, and how to use the table."""
    rows = [(f.task.name, shown(f.default), shown(f.best), f"{f.best_ms:.3f}", f"{f.gain:.2f}x") for f in found]
    headers = ("kernel", "built-in", "best", "pass ms", "gain")
    left = [t.name for t in work[len(found) :]]
    if as_json:
        content = {"table": str(path), "found": [dict(zip(headers, row, strict=True)) for row in rows], "not run": left}
        output.print_json(content)
        return
    output.print_table(headers, rows, right=("pass ms", "gain"))
    output.say("", f"{sum(f.tried for f in found)} configurations ran; tiles are queries x keys, warps, stages")
    if wrong := sum(f.wrong for f in found):
        output.say(f"{wrong} that were faster gave wrong results and were not taken")
    if left:
        output.say("", f"not searched, the time was up: {', '.join(left)}")
    output.say("", f"written: {path}", f"use it: export FLASH_ATTENTION_TUNING_TABLE={path.resolve()}")
