"""When Python looks for garbage: not in the middle of work that makes many objects and keeps most of them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collected_later() -> Iterator[None]:
    """No look for reference cycles within the block, which should end soon. Every look goes through all that
    is kept besides: of a plan for 10,000 models that was 7% of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
