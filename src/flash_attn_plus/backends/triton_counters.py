"""What launches need of a GPU's memory besides tensors: zeros that they leave as zeros, so that none writes them first,
and room for parts of results.

Launches that may run at the same time never share any: those of one stream run one after the other, and each launch
that a CUDA graph captures has its own.
"""

import threading
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

_CAPTURED = 1 << 18  # counters for captured launches, a megabyte; when they are used up, graphs clear their own
_MOST_KEPT = 1 << 21  # numbers of room kept for a stream, 8 megabytes; more of them belong to one launch


class Scratch(NamedTuple):
    """float32 numbers of any value, int32 zeros, how many there are of each, and where they lie."""

    room: Tensor | None
    counters: Tensor | None
    most_room: int
    most_counters: int
    places: tuple[int | None, int | None]


NONE = Scratch(None, None, 0, 0, (None, None))


class Counters:
    """The counters of one device, and room."""

    def __init__(self, device: torch.device):
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._of_stream: dict[int, Scratch] = {}
        self._of_graphs: Tensor | None = None  # those that no captured launch has
        self._lock = threading.Lock()

    def scratch(self, counters: int, room: int) -> Scratch:
        """At least so many of each for the next launch on the current stream; it must leave the zeros behind."""
        if not self._is_cuda:
            return self._new(counters, room)
        if torch.cuda.is_current_stream_capturing():
            return self._of(self._captured(counters), self._room(room))
        if room > _MOST_KEPT:
            return self._of(cast("Tensor", self.scratch(counters, 0).counters), self._room(room))
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        found = self._of_stream.get(stream)
        if found is None or counters > found.most_counters or room > found.most_room:
            found = self._of_stream[stream] = self._larger(found, counters, room)
        return found

    def _larger(self, found: Scratch | None, counters: int, room: int) -> Scratch:
        if self._of_graphs is None:
            self._of_graphs = self._zeros(_CAPTURED)
        zeros, kept = (None, None) if found is None else (found.counters, found.room)
        if zeros is None or counters > zeros.numel():
            zeros = self._zeros(max(1024, 2 * counters))
        return self._of(zeros, self._room(room) if kept is None or room > kept.numel() else kept)

    def _captured(self, number: int) -> Tensor:
        with self._lock:
            rest = self._of_graphs
            if rest is None or rest.numel() < number:
                return self._zeros(number)  # within the graph, which clears them at each replay
            size = -(-number // 4) * 4
            self._of_graphs = rest[size:]
            return rest[:size]

    def _new(self, counters: int, room: int) -> Scratch:
        return self._of(self._zeros(counters), self._room(room))

    def _zeros(self, number: int) -> Tensor:
        return torch.zeros(number, dtype=torch.int32, device=self._device)

    def _room(self, number: int) -> Tensor:
        return torch.empty(number, dtype=torch.float32, device=self._device)

    @staticmethod
    def _of(counters: Tensor, room: Tensor) -> Scratch:
        return Scratch(room, counters, room.numel(), counters.numel(), (room.data_ptr(), counters.data_ptr()))


of = cache(Counters)
