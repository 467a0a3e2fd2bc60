"""Time attention here: our backends beside PyTorch's and every other library that is installed, on calls of four kinds
(prefill, train, decode, varlen; all by default), with percent of this machine's roofline, which is measured first: the
rate of a matrix product and the bandwidth of a copy. A wrong result gets no number, and makes the exit code 1.

  flash-attn-plus bench prefill decode --csv new.csv --against old.csv
"""

import argparse
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from flash_attn_plus.cli import measure, output, providers, results, suites, words
from flash_attn_plus.cli.info import versions
from flash_attn_plus.cli.results import Row
from flash_attn_plus.cli.tune import device_name
from flash_attn_plus.errors import InvalidArgument, NoBackend

SUMMARY = "time our backends and other libraries here"
# What libraries raise for calls that they do not serve, running out of memory included.
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, LookupError, OSError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bench`."""
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(suites.SUITES)} (default: all)")
    parser.add_argument("--device", help="default: the accelerator that PyTorch sees, else cpu")
    parser.add_argument("--dtype", default=None, help="bf16 (default on an accelerator), fp16 or fp32 (on a CPU)")
    parser.add_argument("--lengths", help="sequence lengths, such as 1024,4096")
    for name in ("batch", "heads", "heads-k", "head-dim"):
        parser.add_argument(f"--{name}", help="in place of the suite's own")
    parser.add_argument("--providers", help="only these, such as 'ours: triton,SDPA flash'")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further case after this (default 600)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png, .pdf or .svg; needs matplotlib)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="an earlier --csv: show how many times faster")


def run_one(bench: suites.Bench, name: str, provider: providers.Provider, roof: measure.Roofline) -> Row:
    """Check a provider's result and time it."""
    s = bench.shape
    about = (s.suite, s.name, words.name_of(s.dtype), name)
    call = bench.call(provider)
    if call is None:
        return Row(*about, "not served", told="it has no such call")
    warned: list[warnings.WarningMessage] = []
    try:
        with torch.set_grad_enabled(s.suite == "train"), provider.serving():
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found = call()
            for w in warned:  # a call that is served may have something to tell
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
            try:
                why = bench.wrong(found)
            except torch.OutOfMemoryError:
                return Row(*about, "not run", told="too little memory to check the result; give shorter --lengths")
            if why:
                return Row(*about, "wrong", told=why)
            del found
            ms = measure.milliseconds(call, bench.q.device)
    except NoBackend as error:
        return Row(*about, "not served", told=str(error).partition(" The call:")[0])
    except _REFUSALS as error:
        return Row(*about, "not served", told=f"{type(error).__name__}: {_sentence(error, warned)}")
    flops, moved = bench.work()
    percent = 100.0 * roof.milliseconds(flops, moved) / ms
    rates = (flops / ms * 1e-9, moved / ms * 1e-6)
    return Row(*about, "ok", _short(ms), _short(rates[0]), _short(rates[1]), _short(percent))


def _sentence(error: Exception, warned: list[warnings.WarningMessage]) -> str:
    """The error's text on one line, with the reasons that PyTorch warned of before it."""
    texts = [str(w.message).partition(" (Triggered internally")[0].strip() for w in warned]
    reasons = [t for t in texts if not t.endswith(("because:", "runtime disabled."))]
    return " ".join(" ".join([str(error), *dict.fromkeys(reasons)]).split())


def _short(x: float) -> float:
    """Four digits: what a measurement is good for."""
    return float(f"{x:.4g}")


def plan(arguments: argparse.Namespace, where: torch.device, dtype: torch.dtype) -> list[suites.Shape]:
    """The calls to measure."""
    for suite in arguments.suites:
        if suite not in suites.SUITES:
            raise InvalidArgument(f"{suite} is no suite; choose among {', '.join(suites.SUITES)}")
    sizes = {}
    for field in ("batch", "heads", "heads_k", "head_dim"):
        if (text := getattr(arguments, field)) is not None:
            sizes[field] = words.read_count(f"--{field.replace('_', '-')}", text)
    lengths = [words.read_count("--lengths", x) for x in arguments.lengths.split(",")] if arguments.lengths else []
    wanted = list(dict.fromkeys(arguments.suites)) or list(suites.SUITES)
    found = [shape for suite in wanted for shape in suites.shapes(suite, where, dtype, sizes, lengths)]
    if found[0].heads % found[0].heads_k:
        raise InvalidArgument(f"--heads {found[0].heads} is no multiple of --heads-k {found[0].heads_k}")
    return found


def asked_providers(text: str | None) -> list[str] | None:
    """The names of --providers, each of them known."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    known = [*(providers.label(n) for n in providers.selection.NAMES), *providers.PEERS]
    for name in names:
        if name not in known:
            raise InvalidArgument(f"--providers does not know {name!r}; choose among {', '.join(known)}")
    return names


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 1 when a result is wrong."""
    where = words.read_device("--device", arguments.device) if arguments.device else words.default_device()
    default = "fp32" if where.type == "cpu" else "bf16"
    dtype = words.read_dtype("--dtype", arguments.dtype or default)
    if dtype == torch.float64:
        raise InvalidArgument("--dtype fp64 is what results are held to; choose bf16, fp16 or fp32")
    words.check_seconds(arguments.seconds)
    shapes = plan(arguments, where, dtype)
    earlier = results.read_csv(arguments.against) if arguments.against else ({}, "")
    if arguments.csv:
        results.check_output("--csv", arguments.csv)
    if arguments.plot:
        results.check_plot(arguments.plot)
    found, absent = providers.available(where, dtype, asked_providers(arguments.providers))
    if not found:
        told = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise InvalidArgument(f"none of the providers runs here ({told})")
    start, roof = time.monotonic(), measure.roofline(where, dtype)
    about = {
        "device": device_name(where), "matmul_tflops": _short(roof.tflops), "copy_gbps": _short(roof.gbps),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": " ".join(f"{k}={v}" for k, v in versions().items() if k in ("flash_attn_plus", "torch", "triton")),
    }  # fmt: skip
    rows: list[Row] = []
    with output.Progress("measuring", len(shapes) * len(found)) as progress:
        for shape in shapes:
            bench = None
            for name, provider in found.items():
                progress.starts(f"{shape.suite} {shape.name} {name}")
                if time.monotonic() - start > arguments.seconds:
                    key = (shape.suite, shape.name, words.name_of(dtype), name)
                    rows.append(Row(*key, "not run", told="the time was up"))
                else:
                    bench = bench or suites.Bench(shape, where)
                    rows.append(run_one(bench, name, provider, roof))
                progress.advance()
    if arguments.csv:
        results.write_csv(arguments.csv, rows, about)
    if arguments.plot:
        results.plot(arguments.plot, rows, f"{about['device']}, {about['versions']}")
    report(arguments, rows, about, absent, earlier)
    return 1 if any(row.status == "wrong" for row in rows) else 0


def report(
    arguments: argparse.Namespace,
    rows: list[Row],
    about: dict[str, Any],
    absent: dict[str, str],
    earlier: tuple[dict[tuple[str, str, str, str], float], str],
) -> None:
    """Print the rows, with how many times faster than an earlier run each is, and what has no number."""
    times, device = earlier
    ratios = {r.key: times[r.key] / r.ms for r in rows if r.ms and r.key in times}
    if arguments.json:
        shown = [r._asdict() | ({"times_faster": round(ratios[r.key], 4)} if r.key in ratios else {}) for r in rows]
        output.print_json(about | {"absent": absent, "rows": shown})
        return
    output.say(
        f"{about['device']}, {rows[0].dtype}; {about['versions']}",
        f"roofline: {about['matmul_tflops']} TFLOP/s of a matrix product, {about['copy_gbps']} GB/s of a copy",
    )
    if arguments.against and device != about["device"]:
        output.say(f"note: {arguments.against} is of another device, {device}")
    if arguments.against and not ratios:
        output.say(f"note: {arguments.against} holds none of these cases; give it the same sizes")
    for suite in dict.fromkeys(r.suite for r in rows):
        mine = [r for r in rows if r.suite == suite]
        output.say("", f"{suite}: {suites.SUITES[suite]}")
        headers = ("case and provider", "ms", "TFLOP/s", "GB/s", "% roof", *(("faster",) if arguments.against else ()))
        if cells := _cells(mine, ratios, bool(arguments.against)):
            output.print_table(headers, cells, right=headers[1:])
        without: dict[tuple[str, str, str], list[str]] = {}
        for r in mine:
            if r.status != "ok":
                without.setdefault((r.status, r.provider, r.told), []).append(r.case)
        for (status, provider, told), cases in without.items():
            output.say(f"{status}: {provider}: {told} ({'; '.join(cases)})")
    output.say("")
    for name, why in absent.items():
        output.say(f"not here: {name}: {why}")


def _cells(rows: list[Row], ratios: dict[tuple[str, str, str, str], float], has_ratio: bool) -> list[list[str]]:
    """One line a row, below a line for its case."""
    cells, last = [], ""
    for r in rows:
        if r.status != "ok":
            continue
        numbers = [f"{r.ms:.3f}", f"{r.tflops:.3g}", f"{r.gbps:.3g}", f"{r.roofline_percent:.1f}"]
        ratio = [f"{ratios[r.key]:.2f}x" if r.key in ratios else "-"] if has_ratio else []
        if r.case != last:
            cells.append([r.case, *[""] * (len(numbers) + len(ratio))])
        cells.append([f"  {r.provider}", *numbers, *ratio])
        last = r.case
    return cells
