"""Keys of compiled kernels that are the same in every process, so that one finds on disk what another compiled.

A kernel's key holds the values of constants that its helpers name. Triton (3.6 and before) leaves out those of a helper
that had no key of its own yet when the kernel's was made, so keys depend on the order in which a process meets its
kernels. Here every helper gets its key first: when its module has been imported, which is after those that it calls.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def _helpers(module: ModuleType) -> Iterator[Any]:
    """What kernels call of a module: its functions, and the methods of its records."""
    for name, value in vars(module).items():
        if hasattr(type(value), "cache_key") and not name.endswith("_kernel"):
            yield value
        elif getattr(value, "__triton_aggregate__", False):
            yield from (method for method in value.hash_attrs if hasattr(type(method), "cache_key"))


class _Settled(ModuleType):
    """A package; Python stores each of its modules in it once that is imported, by whatever statement."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType):
            for helper in _helpers(value):
                helper.cache_key  # noqa: B018 -- reading it makes it


def settle(package: str) -> None:
    """From now on make the keys of the helpers of each of the package's modules when it is imported."""
    sys.modules[package].__class__ = _Settled
