"""Which backend serves a problem, and why the others do not."""

import importlib
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
    "torch": ("flash_attn_plus.backends.torch_eager", "TorchEager"),
}
# Known names without an adapter in this version: `explain` says so instead of staying silent.
_ABSENT = {
    "flaggems": "no FlagGems adapter in this version; calls go to our own kernels",
    "cuda": "no adapter for the original CUDA kernels in this version; calls go to our own kernels",
}
NAMES = ("gluon", "triton", "cuda", "flaggems", "torch")

_ORDERS = {
    None: ("gluon", "triton", "cuda", "flaggems", "torch"),
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


class Explanation(tuple[Verdict, ...]):
    """Every backend with its reasons, in order of preference; prints as a table."""

    def __str__(self) -> str:
        width = max(len(v.name) for v in self)
        lines = []
        for v in self:
            text = "; ".join(v.reasons) or ("ok  <- chosen" if v.is_chosen else "ok")
            lines.append(f"{v.name:<{width}}  {text}")
        return "\n".join(lines)


@cache
def get(name: str) -> Backend:
    """The backend of that name; raises NoBackend for a name that has no adapter."""
    if name in _ABSENT:
        raise NoBackend(f"backend {name!r}: {_ABSENT[name]}")
    if name not in _REGISTRY:
        raise NoBackend(f"backend {name!r} is unknown; choose one of {', '.join(NAMES)}")
    module, cls = _REGISTRY[name]
    return getattr(importlib.import_module(module), cls)()


def _reasons(name: str, problem: AttentionProblem, is_forced: bool) -> list[str]:
    if name in _ABSENT:
        return [_ABSENT[name]]
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
            return get(name)
        refusals[name] = reasons
    told = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refusals.items())
    raise NoBackend(f"no backend serves this call ({told}). The call: {problem}")


def _say_once(variable: str, value: bool, refusals: dict[str, list[str]], chosen: str) -> None:
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refusals.items())
    text = f"{variable}={str(value).upper()}, but the {chosen} backend runs the call ({why})"
    if text not in _warned:
        _warned.add(text)
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
    verdicts, chosen = [], None
    for name in (*order, *(n for n in NAMES if n not in order)):
        reasons = _reasons(name, problem, bool(forced))
        if not reasons and name not in order:
            reasons = [f"{forced} is asked for by name" if forced else "not in the order of preference for this call"]
        is_chosen = not reasons and chosen is None
        chosen = name if is_chosen else chosen
        verdicts.append(Verdict(name, tuple(reasons), is_chosen))
    return Explanation(verdicts)
