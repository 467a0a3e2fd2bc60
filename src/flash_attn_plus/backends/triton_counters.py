"""Zeros on a GPU that kernels count in and leave as zeros again, so that no launch has to write them first.

Launches that may run at the same time never share a counter: those of one stream run one after the other, and each
launch that a CUDA graph captures has counters of its own.
"""

import threading
from functools import cache

import torch
from torch import Tensor

_CAPTURED = 1 << 18  # counters for captured launches, a megabyte; when they are used up, graphs clear their own


class Counters:
    """The counters of one device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._of_stream: dict[int, Tensor] = {}
        self._of_graphs: Tensor | None = None  # those that no captured launch has
        self._lock = threading.Lock()

    def zeros(self, number: int) -> Tensor:
        """At least `number` int32 zeros for the next launch on the current stream; it must leave zeros behind."""
        if self._device.type != "cuda":
            return self._new(number)
        if torch.cuda.is_current_stream_capturing():
            return self._captured(number)
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        found = self._of_stream.get(stream)
        if found is None or found.numel() < number:
            found = self._of_stream[stream] = self._new(max(1024, 2 * number))
            if self._of_graphs is None:
                self._of_graphs = self._new(_CAPTURED)
        return found

    def _captured(self, number: int) -> Tensor:
        with self._lock:
            rest = self._of_graphs
            if rest is None or rest.numel() < number:
                return self._new(number)  # within the graph, which clears them at each replay
            size = -(-number // 4) * 4
            self._of_graphs = rest[size:]
            return rest[:size]

    def _new(self, number: int) -> Tensor:
        return torch.zeros(number, dtype=torch.int32, device=self._device)


of = cache(Counters)
