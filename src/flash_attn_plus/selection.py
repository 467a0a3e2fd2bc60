"""Which backend serves a problem, and why the others do not."""

import importlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

from flash_attn_plus import env
from flash_attn_plus.backends.base import Backend
from flash_attn_plus.errors import NoBackend
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

# name -> (module, class); imported when first asked for, so that no optional package is touched before.
_REGISTRY = {
    "gluon": ("flash_attn_plus.backends.gluon_hopper", "GluonHopper"),
    "triton": ("flash_attn_plus.backends.triton_portable", "TritonPortable"),
    "cuda": ("flash_attn_plus.backends.cuda_original", "CudaOriginal"),
    "flaggems": ("flash_attn_plus.backends.flaggems", "FlagGems"),
    "torch": ("flash_attn_plus.backends.torch_eager", "TorchEager"),
}
NAMES = tuple(_REGISTRY)

_ORDERS = {
    None: ("gluon", "triton", "cuda", "torch"),
    True: ("flaggems", "gluon", "triton", "torch"),
    False: ("cuda", "gluon", "triton", "torch"),
}
_CPU_FIRST = ("torch",)  # Triton reaches CPU tensors only under its interpreter: for tests, when asked for by name

_forced: list[str] = []
_warned: set[str] = set()


class Verdict(NamedTuple):
    """One backend's answer to a problem."""

    name: str
    reasons: tuple[str, ...]
    is_chosen: bool
    engine: str = ""  # which of the backend's engines would run the call, where it has several


class Explanation(tuple[Verdict, ...]):
    """Every backend with its reasons, in order of preference; prints as a table."""

    def __str__(self) -> str:
        width = max(len(v.name) for v in self)
        lines = []
        for v in self:
            engine = f" ({v.engine})" if v.engine else ""
            text = "; ".join(v.reasons) or f"ok{engine}" + ("  <- chosen" if v.is_chosen else "")
            lines.append(f"{v.name:<{width}}  {text}")
        return "\n".join(lines)


@cache
def get(name: str) -> Backend:
    """The backend of that name; raises NoBackend for an unknown one."""
    if name not in _REGISTRY:
        raise NoBackend(f"backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    module, cls = _REGISTRY[name]
    return getattr(importlib.import_module(module), cls)()


def _reasons(name: str, problem: AttentionProblem, is_forced: bool) -> list[str]:
    backend = get(name)
    found = backend.reasons(problem)
    rather = None if found or is_forced else backend.yields(problem)
    return [rather] if rather else found


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call of the process by one backend within the block; a call it cannot serve raises NoBackend.

    It holds for all threads, since autograd runs the backward pass on threads of its own.
    """
    if name not in NAMES:
        raise NoBackend(f"backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.remove(name)


def _order(problem: AttentionProblem, prefers_flaggems: bool | None) -> tuple[str, ...]:
    return _CPU_FIRST if problem.device.type == "cpu" else _ORDERS[prefers_flaggems]


@lru_cache(maxsize=8192)
def _choose(
    problem: AttentionProblem, forced: str | None, prefers_flaggems: bool | None, excluded: tuple[tuple[str, str], ...]
) -> Backend:
    order = (forced,) if forced else _order(problem, prefers_flaggems)
    refusals = {name: [why] for name, why in excluded}
    for name in order:
        if name in refusals:
            continue
        reasons = _reasons(name, problem, bool(forced))
        if not reasons:
            if prefers_flaggems is not None and refusals and not forced and problem.device.type != "cpu":
                _say_once(env.USE_FLAGGEMS, prefers_flaggems, refusals, name)
            is_free = prefers_flaggems is None and not forced
            faster = _faster(problem, name, [n for n in order if n not in refusals]) if is_free else None
            return get(faster[0] if faster else name)
        refusals[name] = reasons
    told = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refusals.items())
    raise NoBackend(f"no backend serves this call ({told}). The call: {problem}")


def _faster(problem: AttentionProblem, name: str, others: list[str]) -> tuple[str, str] | None:
    """(a backend that serves the problem measurably faster than `name` does, how much)."""
    for other in others:
        why = get(other).leads(problem, name) if other != name else None
        if why:
            return other, why
    return None


def _say_once(variable: str, value: bool, refusals: dict[str, list[str]], chosen: str) -> None:
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refusals.items())
    text = f"{variable}={str(value).upper()}, but the {chosen} backend runs the call ({why})"
    kind = re.sub(r"\d+", "0", text)  # one reason, whatever the sizes
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(text, stacklevel=3)


def forced_backend() -> str | None:
    """The name that `use_backend` or FLASH_ATTENTION_BACKEND asks for, or None."""
    name = _forced[-1] if _forced else env.backend()
    if name is not None and name not in NAMES:
        raise NoBackend(f"{env.BACKEND}={name!r} is unknown; choose one of {', '.join(NAMES)}")
    return name


def choose(problem: AttentionProblem, inputs: AttentionInputs | None = None) -> Backend:
    """The backend that serves the problem, and these inputs of it; raises NoBackend with everybody's reasons."""
    forced, preference = forced_backend(), env.use_flaggems()
    excluded: tuple[tuple[str, str], ...] = ()
    while True:
        backend = _choose(problem, forced, preference, excluded)
        found = backend.input_reasons(inputs) if inputs is not None else []
        if not found:
            return backend
        excluded += ((backend.name, "; ".join(found)),)


def state() -> tuple:
    """What a remembered choice depends on besides the problem."""
    return (env.snapshot(), *_forced)


def explain_problem(problem: AttentionProblem) -> Explanation:
    """Every backend with its reasons; nothing is run."""
    forced, preference = forced_backend(), env.use_flaggems()
    order = (forced,) if forced else _order(problem, preference)
    found = {name: _reasons(name, problem, bool(forced)) for name in order}
    for name in (n for n in NAMES if n not in order):
        dormant = get(name).dormant()
        found[name] = [dormant] if dormant else _reasons(name, problem, bool(forced))
        if not found[name]:
            found[name] = [
                f"{forced} is asked for by name" if forced else "not in the order of preference for this call"
            ]
    chosen = next((name for name in order if not found[name]), None)
    if chosen and preference is None and not forced:
        faster = _faster(problem, chosen, [n for n in order if not found[n]])
        if faster:
            found[chosen] = [faster[1]]
            chosen = faster[0]
    engines = {name: "" if reasons else get(name).engine_name(problem) for name, reasons in found.items()}
    return Explanation(Verdict(n, tuple(reasons), n == chosen, engines[n]) for n, reasons in found.items())
