"""The exceptions a caller can meet."""


class InvalidArgument(RuntimeError, ValueError):
    """An argument breaks the contract; the message names it and the remedy.

    It is a RuntimeError because `flash_attn`'s callers catch that, and a ValueError because it is one.
    """


class NoBackend(RuntimeError):
    """No backend may or can serve the call; the message lists every candidate with its reasons."""
