"""Keys of compiled kernels that are the same in every process, so that one finds on disk what another compiled.

A kernel's key holds the values of constants that its helpers name. Triton (3.6 and before) leaves out those of a helper
that had no key of its own yet when the kernel's was made, so keys depend on the order in which a process meets its
kernels. Here every helper gets its key first, in one order.
"""

from triton.runtime.jit import JITFunction


def settle(*modules: object) -> None:
    """Make the keys of the modules' helpers; a module comes after those whose helpers it calls."""
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and not name.endswith("_kernel"):
                value.cache_key  # noqa: B018 -- reading it makes it
