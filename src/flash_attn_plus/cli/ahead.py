"""Compile kernels before a call needs them: launches are prepared as always, on tensors without contents, not run.

Triton's own launch path does the compiling, so its cache on disk holds the very kernels that a later process looks up.
No device is touched, which is why a kernel can be compiled by many processes at once, and for a device not present.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from flash_attn_plus import device, ops, selection
from flash_attn_plus.backends.triton_portable import is_interpreted
from flash_attn_plus.cli.cache_samples import AppendSample
from flash_attn_plus.cli.fused_samples import FusedSample
from flash_attn_plus.cli.shapes import META, Shapes, shapes_of
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.testing import Case, Layout, arrange
from flash_attn_plus.tuning import table
from flash_attn_plus.tuning.config import TileConfig

# Bytes of shared memory one program may use, and processors of the largest part, by the vendors' documentation.
KNOWN = {
    "cuda:80": (163, 108), "cuda:86": (99, 84), "cuda:89": (99, 142), "cuda:90": (227, 132), "cuda:100": (227, 148),
    "cuda:120": (99, 188), "hip:gfx90a": (64, 104), "hip:gfx942": (64, 304), "hip:gfx950": (160, 256),
    "hip:gfx1100": (64, 96), "hip:gfx1201": (64, 64),
}  # fmt: skip
OURS = ("gluon", "triton")  # the backends whose kernels Triton compiles, best first


class Target(NamedTuple):
    """What is compiled for."""

    name: str  # cuda:90, hip:gfx942
    warp_size: int
    facts: device.Device
    present: torch.device | None  # the device here that it describes

    @property
    def where(self) -> torch.device:
        """The device that a call would name there."""
        return self.present or torch.device("cuda", 0)


class Sample(NamedTuple):
    """One pass of one backend on tensors of a case."""

    backend: str
    case: Case
    dtype: torch.dtype
    is_backward: bool = False
    layout: Layout = "contiguous"  # of the gradients
    is_deterministic: bool = False
    tiles: tuple[str, TileConfig] | None = None  # a kernel and the configuration to use instead of the chosen one
    blocks: tuple[int, int] | None = None  # queries and keys of a block of a mask
    mask_lead: tuple[int, int] = (1, 1)  # that mask's batch and heads

    def place(self) -> tuple[str, str]:
        """(form, where it is first needed), for people."""
        case, form = self.case, "dense"
        if self.blocks:
            form = "blocks"
        elif case.used is not None:
            form = "decode"
        elif case.lengths_q is not None:
            form = "varlen"
        return form, f"b={case.sequences} sq={case.seqlen_q} sk={case.seqlen_k}"


AnySample = Sample | FusedSample | AppendSample


class Job(NamedTuple):
    """One kernel to compile, and the sample whose launches it is one of."""

    target: Target
    sample: AnySample
    kernel: str
    key: str


class Done(NamedTuple):
    """What became of a job."""

    job: Job
    seconds: float
    was_cached: bool
    error: str | None = None


def known_target(name: str) -> Target:
    """A target by name, present or not."""
    if name not in KNOWN:
        raise InvalidArgument(f"--target {name} is unknown; choose one of {', '.join(KNOWN)}")
    kind, arch = name.split(":")
    kilobytes, processors = KNOWN[name]
    facts = device.Device(device.family_of(kind, arch), kilobytes * 1024, processors)
    return Target(name, 64 if arch.startswith("gfx9") else 32, facts, None)


def present_target(where: torch.device) -> Target:
    """The target of a device that is here; raises InvalidArgument where Triton compiles nothing for it."""
    if where.type == "cpu":
        raise InvalidArgument(
            "there is nothing to compile here: PyTorch sees no accelerator, and the CPU's backend is made of PyTorch's"
            " own operations; name another device with --target, such as --target cuda:90"
        )
    from triton.runtime import driver

    with torch.get_device_module(where).device(where):
        target = driver.active.get_current_target()
    return Target(f"{target.backend}:{target.arch}", target.warp_size, device.probe(where), where)


def check_compiler() -> None:
    """Raise InvalidArgument unless Triton can compile in this process."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise InvalidArgument(
            "Triton is not installed, so there is nothing to compile with; install the triton package"
        ) from error
    if is_interpreted():
        raise InvalidArgument("TRITON_INTERPRET is set, so kernels are interpreted, not compiled; unset it")


class _Driver:
    """Stands for a device in Triton's launch path up to the point where a kernel would run."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        kind, arch = target.name.split(":")
        self._target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, target.warp_size)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> "_Driver":
        """What kernels are filed under in this process: no number of a real device, and every block its own."""
        return self

    def get_current_stream(self, _device: object) -> int:
        return 0


@contextmanager
def only_compiling(target: Target, wants: Callable[[str, str], bool]) -> Iterator[list[Any]]:
    """Within the block launches compile for the target, when `wants(kernel, key)` says so, and run nothing.

    Yields the list of what was compiled. A kernel that takes more shared memory than the target has raises
    OutOfResources, as loading it would.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources
    from triton.runtime.jit import JITFunction

    launch, hook, compiled = JITFunction.run, knobs.runtime.jit_cache_hook, []
    limit = target.facts.shared_memory

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = launch(kernel, *args, grid=grid, warmup=True, **options)
        if made is None:
            return
        if made.metadata.shared > limit:
            raise OutOfResources(made.metadata.shared, limit, "shared memory")
        compiled.append(made)

    def is_unwanted(*, key: str, fn: Any, **_rest: Any) -> bool:
        return not wants(fn.name, key)

    driver_before = vars(driver).get("_active", vars(driver).get("active"))  # the latter before Triton 3.5
    try:
        driver.set_active(_Driver(target))
        JITFunction.run, knobs.runtime.jit_cache_hook = compile_only, is_unwanted
        with device.assumed(META, target.facts):
            yield compiled
    finally:
        JITFunction.run, knobs.runtime.jit_cache_hook = launch, hook
        driver.set_active(driver_before)


def _with_mask(shapes: Shapes, lead: tuple[int, int], blocks: tuple[int, int]) -> Shapes:
    problem = shapes.problem()
    counts = -(-problem.seqlen_q // blocks[0]), -(-problem.seqlen_k // blocks[1])
    mask = torch.empty((*lead, *counts), dtype=torch.bool, device=META)
    return shapes._replace(inputs=shapes.inputs._replace(block_mask=mask, block_size=blocks))


def launch(sample: AnySample) -> None:
    """Prepare and launch the sample's kernels, as a call with such tensors would."""
    if not isinstance(sample, Sample):
        sample.launch()
        return
    shapes = shapes_of(sample.case, sample.dtype)
    if sample.blocks:
        shapes = _with_mask(shapes, sample.mask_lead, sample.blocks)
    inputs, problem = shapes.inputs, shapes.problem(META, sample.is_backward, sample.is_deterministic)
    backend = selection.get(sample.backend)
    out, lse = ops.allocate_outputs(inputs.q, inputs.v, problem.is_varlen_q)
    with table.only(*sample.tiles) if sample.tiles else nullcontext():
        if not sample.is_backward:
            backend.plan_forward(problem, inputs)(inputs, out, lse)
            return
        dq, dk, dv = (arrange(torch.empty_like(x), sample.layout) for x in inputs[:3])
        backend.backward(problem, inputs, out, out, lse, None, dq, dk, dv, torch.empty_like(lse))


@contextmanager
def as_if_present(target: Target) -> Iterator[None]:
    """Within the block backends answer as on a machine with the target, unless it is here anyway."""
    if target.present is not None:
        yield
        return
    available = torch.cuda.is_available
    try:
        torch.cuda.is_available = lambda: True
        with device.assumed(target.where, target.facts):
            yield
    finally:
        torch.cuda.is_available = available


def server(target: Target, case: Case, dtype: torch.dtype, is_backward: bool, is_deterministic: bool) -> str | None:
    """Our backend that serves a case on the target, or None when neither does."""
    problem = shapes_of(case, dtype).problem(target.where, is_backward, is_deterministic)
    wanted = selection.forced_backend()
    with as_if_present(target):
        serving = [n for n in ((wanted,) if wanted in OURS else OURS) if not selection.get(n).reasons(problem)]
        first = next((n for n in serving if selection.get(n).yields(problem) is None), None)
    return first or next(iter(serving), None)


def plan(target: Target, samples: Iterable[AnySample]) -> list[Job]:
    """The distinct kernels that the samples launch; nothing is compiled."""
    check_compiler()
    jobs: dict[tuple[str, str], Job] = {}
    current: list[AnySample] = []

    def note(kernel: str, key: str) -> bool:
        jobs.setdefault((kernel, key), Job(target, current[-1], kernel, key))
        return False

    with only_compiling(target, note), as_if_present(target):
        for sample in samples:
            current.append(sample)
            forget_launches()
            launch(sample)
    return list(jobs.values())


def forget_launches() -> None:
    """Let the launchers try their configurations anew: what they remember is of other launches."""
    from flash_attn_plus.backends import triton_launch

    triton_launch.forget_fitting()


def compile_job(job: Job) -> Done:
    """Compile one kernel into Triton's cache; the function of a worker process."""
    from triton import knobs

    hits: list[bool] = []
    is_next_wanted: list[bool] = [False]

    def wants(kernel: str, key: str) -> bool:
        return (kernel, key) == job[2:] or (is_next_wanted[0] and kernel == job.kernel)

    def listen(*, cache_hit: bool, metadata: dict[str, Any], **_rest: Any) -> None:
        hits.append(cache_hit)
        # what does not fit is followed by the launcher's next choice for the same kernel
        is_next_wanted[0] = metadata["shared"] > job.target.facts.shared_memory

    before, start = knobs.compilation.listener, time.perf_counter()
    knobs.compilation.listener = listen
    try:
        forget_launches()
        with only_compiling(job.target, wants), as_if_present(job.target):
            launch(job.sample)
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        return Done(job, time.perf_counter() - start, False, f"{type(error).__name__}: {error}")
    except triton_failures() as error:
        return Done(job, time.perf_counter() - start, False, f"{type(error).__name__}: {error}")
    finally:
        knobs.compilation.listener = before
        forget_launches()
    if not hits:
        return Done(
            job, time.perf_counter() - start, False, "the launch did not come again; report it with the command"
        )
    return Done(job, time.perf_counter() - start, all(hits))


def triton_failures() -> tuple[type[BaseException], ...]:
    """What Triton's compiler raises for a kernel that it cannot compile for a target."""
    from triton.compiler.errors import TritonError
    from triton.runtime.errors import OutOfResources

    return (TritonError, OutOfResources)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start within the block leave Ctrl-C to this one, which ends them without their tracebacks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_children(kind: type[BaseException] | None, *_rest: object) -> None:
    """Let an interrupt not wait for kernels that are half compiled."""
    if kind is KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.terminate()


def compile_all(jobs: list[Job], processes: int, told: Callable[[Done], None]) -> list[Done]:
    """Compile every job in that many processes, one thread each; `told` hears of each as it is done."""
    found = []
    with ExitStack() as stack:
        if processes == 1 or len(jobs) < 2:
            results: Iterable[Done] = map(compile_job, jobs)
        else:
            context = multiprocessing.get_context("spawn")  # a forked process inherits a device it must not use
            workers = min(processes, len(jobs))
            pool = stack.enter_context(
                ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
            )
            stack.callback(pool.shutdown, cancel_futures=True)
            stack.push(_end_children)
            with _without_interrupts():
                futures = [pool.submit(compile_job, job) for job in jobs]
            results = (future.result() for future in as_completed(futures))
        for done in results:
            told(done)
            found.append(done)
    return found


def default_processes() -> int:
    """As many as processors may be used, 32 at most: beyond it memory is what is short."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, usable)
