"""Keys of compiled kernels that are the same in every process, so that one finds on disk what another compiled.

A kernel's key holds the values of constants that its helpers name. Triton (3.6 and before) leaves out those of a helper
that had no key of its own yet when the kernel's was made, so keys depend on the order in which a process meets its
kernels. Here every helper gets its key first, in one order.
"""

from collections.abc import Iterator
from typing import Any


def _helpers(module: object) -> Iterator[Any]:
    """What kernels call of a module: its functions, and the methods of its records."""
    for name, value in vars(module).items():
        if hasattr(type(value), "cache_key") and not name.endswith("_kernel"):
            yield value
        elif getattr(value, "__triton_aggregate__", False):
            yield from (method for method in value.hash_attrs if hasattr(type(method), "cache_key"))


def settle(*modules: object) -> None:
    """Make the keys of the modules' helpers; a module comes after those whose helpers it calls."""
    for module in modules:
        for helper in _helpers(module):
            helper.cache_key  # noqa: B018 -- reading it makes it
