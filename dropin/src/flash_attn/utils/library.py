"""Custom operators made of Triton kernels."""

from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import custom_op, infer_schema


def triton_op(name, fn=None, /, *, mutates_args, schema=None, allow_decomposition=True):
    """torch.library.triton_op that honours a schema and can stay opaque.

    Args:
        name: "namespace::operator".
        fn: the implementation, traceable, its kernels wrapped by torch.library.wrap_triton; without it a decorator
            is returned.
        mutates_args: names of the arguments written to, or ().
        schema: the operator's schema; by default inferred from the annotations of `fn`.
        allow_decomposition: let compilers see the kernels inside; False keeps the operator one opaque node.

    Returns:
        The custom operator.
    """

    def decorate(fn):
        def run(*args, **kwargs):
            with set_wrap_triton_enabled(False):  # in eager mode the kernels launch directly
                return fn(*args, **kwargs)

        chosen = infer_schema(fn, mutates_args=mutates_args) if schema is None else schema
        operator = custom_op(name, run, mutates_args=mutates_args, schema=chosen)
        operator.register_fake(fn)
        if allow_decomposition:

            def decompose(mode, op, types, args, kwargs):
                with mode:
                    return fn(*args, **kwargs)

            operator.register_torch_dispatch(FunctionalTensorMode, decompose)
        return operator

    return decorate if fn is None else decorate(fn)
