"""Compile ahead what a model will need, in parallel processes, into Triton's cache on disk: then no request waits.

  flash-attn-plus warmup "h=32 hk=8 d=128 causal s=1..8192 decode train"
MODEL words: h hk d dv (heads and head dims), dtype=bf16|fp16|fp32, s=FIRST..LAST (lengths, 1..8192), b=FIRST..LAST
(batches, 1..64), causal, window=L,R, softcap[=X], alibi, dropout[=P], varlen (packed batches), train (backward passes
too), decode (one query a sequence on a cache of up to LAST keys, and appends to it), page=SIZE (of it), deterministic.
Beside attention: rmsnorm=FEATURES, layernorm=FEATURES (with and without residual), vocab=CLASSES (cross-entropy),
rotary; blocks=QUERIES,KEYS (attention under a mask of such blocks, for the very lengths of s).
Set TRITON_CACHE_DIR, the same as for the program, to put the kernels into an image or onto a shared disk.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

from flash_attn_plus.cli import ahead, fused_samples, output, words
from flash_attn_plus.cli.cache_samples import AppendSample
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.testing import Case

SUMMARY = "compile what a model needs before it runs"
# Kernels are compiled anew for lengths that are 1, or multiples of 16, and tiles change at powers of two.
_OFFSETS = (0, 1, 2, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `warmup`."""
    parser.add_argument("model", metavar="MODEL", nargs="+", help="the model's attention in words")
    parser.add_argument("--target", help=f"compile for a device that need not be here: {', '.join(ahead.KNOWN)}")
    parser.add_argument("--device", help="the device to compile for (default: the accelerator that PyTorch sees)")
    parser.add_argument("--jobs", type=int, default=None, help="processes (default: one for each processor)")
    parser.add_argument("--dry-run", action="store_true", help="list the kernels without compiling them")


def lengths(first: int, last: int) -> list[int]:
    """Lengths of a range that stand for all others: every way in which kernels are specialised, every tile choice."""
    powers = [1 << n for n in range(last.bit_length() + 1)]
    near = {power + offset for power in powers for offset in _OFFSETS}
    return sorted({first, last} | {n for n in near if first <= n <= last})


def sizes(first: int, last: int) -> list[int]:
    """Batches of a range that stand for all others: how many programs share keys changes by factors of 2."""
    return sorted({first, last} | {1 << n for n in range(last.bit_length()) if first <= 1 << n <= last})


def cases(found: dict[str, Any]) -> Iterator[tuple[Case, bool]]:
    """Every case that the model's words ask for, and whether its backward pass is wanted."""
    fewest, batch = found.get("b", (1, 64))
    base = Case(**words.shape_of(found) | {"page_size": 0, "batch": batch})
    train = bool(found.get("train"))
    for n in lengths(*found.get("s", (1, 8192))):
        yield base._replace(seqlen_q=n, seqlen_k=n), train
        if found.get("varlen"):
            packed = (n,) * batch
            yield base._replace(seqlen_q=n, seqlen_k=n, lengths_q=packed, lengths_k=packed), train
        if found.get("decode"):
            for b in sizes(fewest, batch):
                cache = base._replace(batch=b, seqlen_q=1, seqlen_k=n, used=(n,) * b, dropout_p=0.0)
                yield cache._replace(page_size=found.get("page", 0)), False


def samples(target: ahead.Target, found: dict[str, Any]) -> Iterator[ahead.AnySample]:
    """The passes to compile, attention by the backend that will serve it; raises InvalidArgument when none does."""
    dtype = found.get("dtype", torch.bfloat16)
    for case, train in cases(found):
        for is_backward in (False, True) if train else (False,):
            deterministic = is_backward and bool(found.get("deterministic"))
            name = ahead.server(target, case, dtype, is_backward, deterministic)
            if name is None:
                problem = case.problem(dtype, target.where, is_backward)
                raise InvalidArgument(f"none of our kernels serves this on {target.name}: {problem}")
            yield ahead.Sample(name, case, dtype, is_backward, is_deterministic=deterministic)
            if case.used is not None:
                for is_rotary in (False, True) if found.get("rotary") else (False,):
                    yield AppendSample(case, dtype, is_rotary)
    if "blocks" in found:
        yield from _samples_under_masks(found, dtype)
    yield from fused_samples.samples(found, dtype)


def _samples_under_masks(found: dict[str, Any], dtype: torch.dtype) -> Iterator[ahead.Sample]:
    """Passes under a mask of blocks, which the portable kernels serve: one mask for all, one a head, one a sequence."""
    for case, train in cases(found):
        if case.used is not None:
            continue
        leads = sorted({(1, 1), (1, case.heads), (case.sequences, 1), (case.sequences, case.heads)})
        for is_backward in (False, True) if train else (False,):
            for lead in leads:
                yield ahead.Sample("triton", case, dtype, is_backward, blocks=found["blocks"], mask_lead=lead)


def target_of(arguments: argparse.Namespace) -> ahead.Target:
    """The target that --target or --device name, else the accelerator that is here."""
    if arguments.target and arguments.device:
        raise InvalidArgument("--target and --device say both what to compile for; give one of them")
    if arguments.target:
        return ahead.known_target(arguments.target)
    where = words.read_device("--device", arguments.device) if arguments.device else words.default_device()
    return ahead.present_target(where)


def run(arguments: argparse.Namespace) -> int:
    """Plan, compile and tell; 1 when a kernel could not be compiled."""
    found = words.read(" ".join(arguments.model), words.MODEL_WORDS)
    if found.get("page") and not found.get("decode"):
        raise InvalidArgument("page is the page size of a cache that is decoded from; add decode")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise InvalidArgument(f"--jobs must be positive, not {arguments.jobs}")
    ahead.check_compiler()
    start, target = time.perf_counter(), target_of(arguments)
    jobs = ahead.plan(target, samples(target, found))
    if arguments.dry_run:
        return _list(target, jobs, arguments.json)
    with output.Progress(f"compiling for {target.name}", len(jobs)) as progress:
        done = ahead.compile_all(jobs, arguments.jobs or ahead.default_processes(), lambda _done: progress.advance())
    return _report(target, done, time.perf_counter() - start, arguments.json)


def _list(target: ahead.Target, jobs: list[ahead.Job], as_json: bool) -> int:
    rows = [_row(job) for job in jobs]
    if as_json:
        output.print_json({"target": target.name, "kernels": rows})
        return 0
    output.say(f"{len(jobs)} kernels for {target.name}")
    output.print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    return 0


def _row(job: ahead.Job) -> dict[str, str]:
    form, place = job.sample.place()
    return {"kernel": job.kernel, "form": form, "first needed at": place}


def _report(target: ahead.Target, done: list[ahead.Done], seconds: float, as_json: bool) -> int:
    from triton import knobs

    failed = [d for d in done if d.error]
    cached = sum(d.was_cached for d in done)
    content = {
        "target": target.name, "kernels": len(done), "compiled": len(done) - cached - len(failed),
        "were there": cached, "failed": [_row(d.job) | {"error": d.error} for d in failed],
        "seconds": round(seconds, 1), "compile seconds": round(sum(d.seconds for d in done), 1),
        "cache": knobs.cache.dir,
    }  # fmt: skip
    if as_json:
        output.print_json(content)
        return 1 if failed else 0
    output.say(
        f"{content['kernels']} kernels for {target.name}: {content['compiled']} compiled, {cached} were there,"
        f" {len(failed)} failed; {seconds:.1f} s ({content['compile seconds']} s of compiling)",
        f"cache: {knobs.cache.dir}",
    )
    if target.present is None:
        output.say(
            f"assumed: {target.facts.shared_memory // 1024} KB shared memory, {target.facts.processors} processors"
        )
    for d in failed:
        row = _row(d.job)
        output.say(f"failed: {row['kernel']} ({row['form']}, {row['first needed at']}): {d.error}")
    return 1 if failed else 0
