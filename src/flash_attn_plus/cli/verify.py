"""Check the numerics on this very machine, in about a minute: every backend that runs here, outputs and gradients,
against attention in float64, by the rule of flash_attn_plus.testing (at most twice the error of plain PyTorch in the
same precision, plus a rounding unit). On a GPU the kernels are compiled in parallel first.

Triton's kernels run on a CPU, slowly, when TRITON_INTERPRET=1 is set. The exit code is 1 when a result is wrong.
"""

import argparse
import time
from typing import Any, NamedTuple

import torch

from flash_attn_plus import ops, selection, use_backend
from flash_attn_plus.backends.triton_portable import is_interpreted
from flash_attn_plus.cli import ahead, output, words
from flash_attn_plus.errors import InvalidArgument, NoBackend
from flash_attn_plus.testing import Call, Case, assert_matches_reference, make_inputs, run_forward

SUMMARY = "check the numerics on this machine"
_LENGTHS = {"interpreter": (19, 45), "cpu": (113, 203), "accelerator": (387, 645)}
_PREFERRED = (torch.bfloat16, torch.float16, torch.float32)


class Result(NamedTuple):
    """One case on one backend."""

    case: str
    dtype: str
    backend: str
    status: str  # right, wrong, not served, failed or not run
    told: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `verify`."""
    parser.add_argument("--device", help="default: the accelerator that PyTorch sees, else cpu")
    parser.add_argument("--backend", action="append", help="only this backend; may be repeated")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="start no further case after this long (default 60)"
    )


def cases(size: str) -> dict[str, Case]:
    """One case for every feature; lengths are odd and no multiple of a tile."""
    short, long = _LENGTHS[size]
    base = Case(batch=2, seqlen_q=short, seqlen_k=long, heads=4, heads_k=2, head_dim=64)
    packed: dict[str, Any] = {"lengths_q": (short, 0, 9, long), "lengths_k": (long, 4, 0, short), "right": 0}
    cache = base._replace(seqlen_q=1, used=(long - 7, 5))
    return {
        "full": base,
        "causal": base._replace(right=0),
        "causal d=128": base._replace(right=0, head_dim=128),
        "packed sequences": base._replace(**packed),
        "window": base._replace(left=short // 3, right=short // 4),
        "rows without keys": base._replace(seqlen_q=long, seqlen_k=short, right=0),
        "one head of keys": base._replace(heads_k=1, right=0, head_dim=32),
        "decoding, partly filled cache": cache,
        "decoding, paged cache": cache._replace(page_size=16, heads=8),
        "softcap": base._replace(softcap=3.0, right=0),
        "alibi": base._replace(alibi="heads", right=0),
        "dropout": base._replace(dropout_p=0.17, right=0),
        "large scores": base._replace(q_factor=500.0),
        "d=256": base._replace(head_dim=256, right=0),
        "d=96, dv=40": base._replace(head_dim=96, head_dim_v=40),
    }


def size_on(where: torch.device) -> str:
    """How large cases may be."""
    if where.type != "cpu":
        return "accelerator"
    return "interpreter" if is_interpreted() else "cpu"


def passes(case: Case) -> tuple[bool, ...]:
    """is_backward of each pass that the case defines."""
    return (False, True) if case.has_backward else (False,)


def refusals(backend: str, case: Case, dtype: torch.dtype, where: torch.device) -> list[str]:
    """Why a backend does not serve the passes of a case; empty when it does."""
    try:
        engine = selection.get(backend)
    except NoBackend as error:
        return [str(error)]
    every = [engine.reasons(case.problem(dtype, where, is_backward)) for is_backward in passes(case)]
    return list(dict.fromkeys(reason for reasons in every for reason in reasons))


def gradients(call: Call, out: torch.Tensor, lse: torch.Tensor) -> dict[str, torch.Tensor]:
    """dq, dk and dv of the engine, in buffers that start as NaN."""
    x = call.inputs
    grads = [torch.full_like(t, torch.nan, memory_format=torch.contiguous_format) for t in x[:3]]
    with torch.no_grad():
        ops.backward(
            call.dout, *x[:3], out, lse, None, *grads, x.cu_seqlens_q, x.cu_seqlens_k, call.max_seqlen_q,
            call.max_seqlen_k, None, None, None, x.alibi_slopes, x.rng_state, x.dropout_p, x.softmax_scale, call.left,
            call.right, x.softcap, False,
        )  # fmt: skip
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def check(name: str, case: Case, dtype: torch.dtype, backend: str, where: torch.device) -> Result:
    """Run a case on a backend and hold every result to the rule."""
    about = (name, words.name_of(dtype), backend)
    if why := refusals(backend, case, dtype, where):
        return Result(*about, "not served", "; ".join(why))
    call = make_inputs(case, dtype, where)
    try:
        with use_backend(backend):
            found = run_forward(call)
            if case.has_backward:
                found |= gradients(call, found["out"], found["lse"])
        assert_matches_reference(call, found)
    except AssertionError as error:
        return Result(*about, "wrong", str(error))
    except NoBackend as error:  # the tensors themselves rule the backend out
        return Result(*about, "not served", str(error))
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, OSError, KeyError) as error:
        return Result(*about, "failed", f"{type(error).__name__}: {error}")
    return Result(*about, "right")


def plan(where: torch.device, backends: list[str]) -> list[tuple[str, Case, torch.dtype, str]]:
    """Everything to check, the most telling first: each case in the first dtype that a backend takes, then others."""
    found = []
    every = cases(size_on(where)).items()
    for turn in range(len(_PREFERRED)):
        for number, (name, case) in enumerate(every):
            for backend in backends:
                taken = [d for d in _PREFERRED if not refusals(backend, case, d, where)] or [_PREFERRED[0]]
                if turn == 0 or (turn < len(taken) and (size_on(where) == "cpu" or number < 3)):
                    found.append((name, case, taken[turn], backend))
    return found


def compile_ahead(where: torch.device, work: list[tuple[str, Case, torch.dtype, str]]) -> None:
    """Compile in parallel what the work will launch; where that does not work, the launches compile."""
    if where.type == "cpu":
        return
    try:
        target = ahead.present_target(where)
        samples = [
            ahead.Sample(backend, case, dtype, is_backward)
            for _, case, dtype, backend in work
            if backend in ahead.OURS and not refusals(backend, case, dtype, where)
            for is_backward in passes(case)
        ]
        jobs = ahead.plan(target, samples)
    except (InvalidArgument, RuntimeError, TypeError) as error:
        output.say(f"not compiled in parallel: {error}")
        return
    with output.Progress("compiling", len(jobs)) as progress:
        ahead.compile_all(jobs, ahead.default_processes(), lambda _done: progress.advance())


def available(where: torch.device, asked: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Backends that serve some case here, and why the others do not."""
    for name in asked or ():
        if name not in selection.NAMES:
            raise InvalidArgument(f"--backend {name} is unknown; choose one of {', '.join(selection.NAMES)}")
    serving, absent = [], {}
    every = list(cases(size_on(where)).values())
    for name in dict.fromkeys(asked or selection.NAMES):
        whys = [refusals(name, case, dtype, where) for dtype in _PREFERRED for case in every]
        if all(whys):
            absent[name] = "; ".join(whys[0])
        else:
            serving.append(name)
    return serving, absent


def run(arguments: argparse.Namespace) -> int:
    """Check, print a table, and return 1 when anything is wrong."""
    words.check_seconds(arguments.seconds)
    where = words.read_device("--device", arguments.device) if arguments.device else words.default_device()
    start = time.monotonic()
    serving, absent = available(where, arguments.backend)
    if not serving:
        told = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise InvalidArgument(f"no backend runs on {where} ({told})")
    work, results = plan(where, serving), []
    compile_ahead(where, work)
    with output.Progress("verifying", len(work)) as progress:
        for name, case, dtype, backend in work:
            progress.starts(f"{name} {words.name_of(dtype)} {backend}")
            if time.monotonic() - start > arguments.seconds:
                results.append(Result(name, words.name_of(dtype), backend, "not run", "the time was up"))
            else:
                results.append(check(name, case, dtype, backend, where))
            progress.advance()
    seconds = time.monotonic() - start
    is_right = not any(r.status in ("wrong", "failed") for r in results)
    if arguments.json:
        rows = [r._asdict() for r in results]
        head = {"device": str(where), "right": is_right, "seconds": round(seconds, 1), "absent": absent}
        output.print_json(head | {"results": rows})
    else:
        show(results, absent, where, seconds)
    return 0 if is_right else 1


def show(results: list[Result], absent: dict[str, str], where: torch.device, seconds: float) -> None:
    """A line a case, a column a backend with the dtypes that are right, then everything else in words."""
    names = list(dict.fromkeys(r.backend for r in results))
    cells: dict[str, dict[str, dict[str, list[str]]]] = {}
    for r in sorted(results, key=lambda r: r.status != "right"):
        status = r.status.upper() if _is_bad(r) else r.status
        cells.setdefault(r.case, {}).setdefault(r.backend, {}).setdefault(status, []).append(r.dtype)
    order = dict.fromkeys(r.case for r in results)
    rows = [(case, *(_cell(cells[case].get(n, {})) for n in names)) for case in order]
    output.say(f"Numerics on {where}, outputs and gradients, against float64: the dtypes that are right")
    output.print_table(("case", *names), rows)
    counts: dict[str, int] = dict.fromkeys(("right", "wrong", "failed", "not served", "not run"), 0)
    for r in results:
        counts[r.status] += 1
    output.say("", ", ".join(f"{n} {status}" for status, n in counts.items() if n) + f"; {seconds:.0f} s")
    for r in results:
        if r.status == "not served" or _is_bad(r):
            output.say(f"{r.status}: {r.case} ({r.dtype}) by {r.backend}: {r.told}")
    for name, why in absent.items():
        output.say(f"not here: {name}: {why}")


def _cell(dtypes: dict[str, list[str]]) -> str:
    """The dtypes that are right, then those that are not with the word for it; a dash for a case that is not served."""
    parts = [
        f"{'' if status == 'right' else status + ': '}{' '.join(names)}"
        for status, names in dtypes.items()
        if status != "not served"
    ]
    return "; ".join(parts) or "-"


def _is_bad(r: Result) -> bool:
    return r.status in ("wrong", "failed")
