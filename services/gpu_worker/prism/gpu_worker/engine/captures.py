"""CUDA graphs are captured while no other thread of the engine waits for the GPU.

Until the capture of a graph has ended, CUDA refuses all threads of the process what could wait for the GPU
(`cudaStreamCaptureModeGlobal`, torch's default): the thread that asks gets an error, and the capture too.
"""

import functools
from collections.abc import Callable
from typing import Any


def wait_before_each(graph_class: Any, wait: Callable[[], None]) -> None:
    """Have `wait` called before each capture of `graph_class`, which is torch's CUDAGraph."""
    begin: Callable[..., None] = graph_class.capture_begin

    @functools.wraps(begin)
    def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
        wait()
        begin(graph, *args, **kwargs)

    graph_class.capture_begin = capture_begin
