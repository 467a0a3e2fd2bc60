"""The key of Triton's own build, a part of every compiled kernel's: kept on disk, since it takes a third of a second.

Before it looks for a compiled kernel, Triton reads and hashes all of its library, some 400 MB, in every process. The
key that comes out is kept beside the kernels, under the paths, sizes and times of change of the files that make it;
when one of these differs, Triton hashes anew. A first process does so in a thread, while Triton's driver is built.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from triton import knobs
from triton.runtime import cache

_NAME = "triton_key.txt"
_PARTS = ("compiler", "backends", "language", "_C")


def _files() -> Iterator[Path]:
    """The files that Triton's key is made of, and some more, in a fixed order."""
    yield Path(cache.__file__)
    for part in _PARTS:
        for folder, folders, names in os.walk(Path(cache.__file__).parents[1] / part, followlinks=True):
            folders.sort()
            yield from (Path(folder, name) for name in sorted(names) if name.endswith((".py", ".so", ".pyd")))


def _stamp() -> str:
    """What differs when one of the files does."""
    found = ((path, path.stat()) for path in _files())
    return hashlib.sha256(repr([(str(p), s.st_size, s.st_mtime_ns) for p, s in found]).encode()).hexdigest()


def _stored() -> str | None:
    """The key as an earlier process left it."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # no folder for a cache, or what is no text
        path = cache.get_cache_manager(_stamp()).get_file(_NAME)
        return Path(path).read_text() if path else None
    return None


def _store(key: str) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # kernels may be read from where nothing can be written
        cache.get_cache_manager(_stamp()).put(key, _NAME, binary=False)


class _Remembered:
    """Triton's function that makes the key, which reads it from disk if it can."""

    def __init__(self, original: Callable[[], str]):
        self._original, self._key = original, ""
        self._made: list[str] = []
        self._thread = threading.Thread(target=lambda: self._made.append(original()), daemon=True)
        if not knobs.runtime.interpret and _stored() is None:
            self._thread.start()

    def __call__(self) -> str:
        if not self._key:
            self._key = _stored() or self._hash()
        return self._key

    def _hash(self) -> str:
        if self._thread.ident is not None:
            self._thread.join()
        key = self._made[0] if self._made else self._original()  # a forked process has no thread
        _store(key)
        return key


def remember() -> None:
    """Let Triton take its key from disk from now on; does nothing where Triton makes it in another way."""
    original = getattr(cache, "triton_key", None)
    if hasattr(original, "cache_info"):  # hashed once a process, as by Triton itself
        cache.triton_key = _Remembered(original)
