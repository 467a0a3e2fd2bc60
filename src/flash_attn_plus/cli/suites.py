"""What `bench` measures: calls of four kinds, how much work each is, and whether a result is right."""

from collections.abc import Callable, Iterator
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.cli.providers import Provider
from flash_attn_plus.problem import AttentionInputs
from flash_attn_plus.testing import Call, assert_close, run_reference

SUITES = {
    "prefill": "forward, causal",
    "train": "forward and backward, causal",
    "decode": "one token a sequence on a cache that is three quarters full or less",
    "varlen": "forward, causal, packed sequences of unequal lengths",
}
_CHECKED_SCORES = 1 << 31  # of a call; beyond it the parts that are checked are spread over the call
_CHECKED_ROWS = 1024  # at once: scores in float64 take memory
_SHARES = (1.0, 0.55, 0.3, 0.8, 0.15, 0.4, 0.05, 0.65)  # of the longest length, in turn


class Shape(NamedTuple):
    """Sizes of one measured call."""

    suite: str
    batch: int
    length: int
    heads: int
    heads_k: int
    head_dim: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The case, as a table and a file name it."""
        grouped = f" hk={self.heads_k}" if self.heads_k != self.heads else ""
        return f"b={self.batch} s={self.length} h={self.heads}{grouped} d={self.head_dim}"

    @property
    def lengths(self) -> list[int]:
        """The length of each sequence; of its cache, in decoding."""
        if self.suite == "varlen":
            return [max(1, int(self.length * _SHARES[n % len(_SHARES)])) for n in range(self.batch)]
        if self.suite == "decode":
            return [max(1, int(self.length * 0.75 * _SHARES[n % len(_SHARES)])) for n in range(self.batch)]
        return [self.length] * self.batch


def shapes(
    suite: str, where: torch.device, dtype: torch.dtype, sizes: dict[str, int], lengths: list[int]
) -> list[Shape]:
    """The calls of a suite: Llama-like heads and 16,384 tokens on an accelerator, small ones on a CPU."""
    is_large = where.type != "cpu"
    heads = sizes.get("heads") or (32 if is_large else 8)
    heads_k = sizes.get("heads_k") or (max(1, heads // 4) if not sizes.get("heads") else heads)
    head_dim = sizes.get("head_dim") or (128 if is_large else 64)
    default = [1024, 4096, 16384] if is_large else [512, 2048]
    if suite == "train" and is_large:
        default = [1024, 4096, 8192]
    if suite == "decode":
        default = [1024, 8192, 65536] if is_large else [1024, 4096]
    found = []
    for length in lengths or default:
        many = max(1, (1 << 20) // length if suite == "decode" else 16384 // length) if is_large else 2
        batch = sizes.get("batch") or min(64, many if suite != "varlen" else max(8, many))
        found.append(Shape(suite, batch, length, heads, heads_k, head_dim, dtype))
    return found


class Part(NamedTuple):
    """Queries [start, stop) of one sequence, of the heads that share a head of keys."""

    sequence: int
    head: int
    start: int
    stop: int


class Bench:
    """The tensors of a call, the work it is, and the judgement of a provider's results."""

    def __init__(self, shape: Shape, where: torch.device):
        self.shape = s = shape
        self._where = where
        torch.manual_seed(0)
        lengths = s.lengths
        self._starts = list(accumulate(lengths, initial=0))
        lead_q: tuple[int, ...] = (s.batch, 1 if s.suite == "decode" else s.length)
        lead_k: tuple[int, ...] = (s.batch, s.length)
        if s.suite == "varlen":
            lead_q = lead_k = (sum(lengths),)
        self.q, self.dout = (self._normal(*lead_q, s.heads, s.head_dim) for _ in range(2))
        self.k, self.v = (self._normal(*lead_k, s.heads_k, s.head_dim) for _ in range(2))
        if s.suite == "train":
            for x in (self.q, self.k, self.v):
                x.requires_grad_()
        self._cu = torch.tensor(self._starts, dtype=torch.int32, device=where)
        self._lengths = torch.tensor(lengths, dtype=torch.int32, device=where)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._where, dtype=self.shape.dtype)

    def work(self) -> tuple[float, float]:
        """Operations, and bytes that must move at least."""
        s, one = self.shape, self.shape.dtype.itemsize
        if s.suite == "decode":
            pairs, rows_q, rows_k = sum(s.lengths), s.batch, sum(s.lengths)
        else:
            pairs, rows_q, rows_k = sum(n * (n + 1) // 2 for n in s.lengths), sum(s.lengths), sum(s.lengths)
        flops = 4.0 * pairs * s.heads * s.head_dim
        moved = 2.0 * (rows_q * s.heads + rows_k * s.heads_k) * s.head_dim * one
        return (flops * 3.5, moved * 3) if s.suite == "train" else (flops, moved)

    def call(self, provider: Provider) -> Callable[[], tuple[Tensor, ...]] | None:
        """What runs the provider once and returns out, in training also the gradients; None if it has no such call."""
        q, k, v, suite = self.q, self.k, self.v, self.shape.suite
        dense, packed, decode = provider.dense, provider.packed, provider.decode
        if suite == "decode":
            return None if decode is None else lambda: (decode(q, k, v, self._lengths),)
        if suite == "varlen":
            longest = max(self.shape.lengths)
            return None if packed is None else lambda: (packed(q, k, v, self._cu, longest),)
        if dense is None:
            return None
        if suite == "prefill":
            return lambda: (dense(q, k, v, True),)

        def step() -> tuple[Tensor, ...]:
            out = dense(q, k, v, True)
            return (out, *torch.autograd.grad(out, (q, k, v), self.dout))

        return step

    def wrong(self, results: tuple[Tensor, ...]) -> str | None:
        """What is wrong with results, by the rule of flash_attn_plus.testing; None when nothing is.

        Parts are checked one by one, as many of them, spread evenly over the call, as is affordable.
        """
        names = ("out", "dq", "dk", "dv")[: len(results)]
        with torch.no_grad():
            for name, x, like in zip(names, results, (self.q, self.q, self.k, self.v), strict=False):
                if x.shape != like.shape:
                    return f"{name} has shape {tuple(x.shape)}, not {tuple(like.shape)}"
                if not bool(x.isfinite().all()):
                    return f"{name} holds NaN or infinity"
        every = list(self._parts())
        rows, group = max(part.stop - part.start for part in every), self.shape.heads // self.shape.heads_k
        count = max(2, _CHECKED_SCORES // (rows * group * max(self.shape.lengths)))
        step = max(1, -(-len(every) // count))
        for part in dict.fromkeys([*every[::step], every[-1]]):
            try:
                self._check(names, results, part)
            except AssertionError as error:
                return f"sequence {part.sequence}, head of keys {part.head}: {error}"
        return None

    def _parts(self) -> Iterator[Part]:
        """What can be checked alone: some queries of one head of keys; all of them where there are gradients."""
        s = self.shape
        for n, head in product(range(s.batch), range(s.heads_k)):
            length = 1 if s.suite == "decode" else s.lengths[n]
            rows = length if s.suite == "train" else _CHECKED_ROWS
            for start in range(0, length, rows):
                yield Part(n, head, start, min(length, start + rows))

    def _check(self, names: tuple[str, ...], results: tuple[Tensor, ...], p: Part) -> None:
        """Hold a part, with the keys that its queries see, to the rule."""
        s, n = self.shape, p.sequence
        group = s.heads // s.heads_k
        queries, keys = slice(p.head * group, (p.head + 1) * group), slice(p.head, p.head + 1)
        rows_q, rows_k = slice(p.start, p.stop), slice(0, s.lengths[n] if s.suite == "decode" else p.stop)

        def part(x: Tensor, heads: slice, rows: slice) -> Tensor:
            x = x.detach()
            return (x[self._starts[n] :][None] if s.suite == "varlen" else x[n : n + 1])[:, rows, heads]

        q, dout = (part(x, queries, rows_q) for x in (self.q, self.dout))
        k, v = (part(x, keys, rows_k) for x in (self.k, self.v))
        right = -1 if s.suite == "decode" else 0
        call = Call(AttentionInputs(q, k, v, s.head_dim**-0.5), dout, torch.zeros(0), -1, right, 0, 0)
        options = {"with_gradients": len(names) > 1}
        reference, eager = (run_reference(call, dtype, **options) for dtype in (torch.float64, s.dtype))
        for name, x in zip(names, results, strict=True):
            mine = part(x, queries, rows_q) if name in ("out", "dq") else part(x, keys, rows_k)
            assert_close(name, mine, reference[name], eager[name])
