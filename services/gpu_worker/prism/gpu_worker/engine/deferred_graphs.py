"""CUDA graphs captured once an engine is idle, rather than before its first token.

Decoding without graphs is slower but right; capturing takes one to three seconds, in which nothing else runs.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from prism.common.errors import words_of

log = logging.getLogger(__name__)

QUIET_S = 2.0
CAPTURE = "init_decode_cuda_graph"


class DeferredGraphs:
    """Stands in for a model runner class's capture until nothing has been asked for `quiet_s` seconds.

    `runner_class` is SGLang's ModelRunner: without a captured graph it decodes eagerly.
    """

    def __init__(self, runner_class: Any, quiet_s: float = QUIET_S) -> None:
        self._quiet_s = quiet_s
        self._capture: Callable[[Any], None] = getattr(runner_class, CAPTURE)
        self._runners: list[Any] = []
        self._steps = -1
        self._quiet_since = 0.0
        runners = self._runners

        def defer(runner: Any) -> None:
            runner.decode_cuda_graph_runner = None
            runner.graph_mem_usage = 0
            runners.append(runner)

        setattr(runner_class, CAPTURE, defer)

    @property
    def pending(self) -> bool:
        """Whether there is something to capture."""
        return bool(self._runners)

    def begin_anew(self) -> None:
        """The engine was asleep: quiet begins when it is next idle."""
        self._steps = -1

    def idle(self, steps: int, now: float, *, exporting: bool = False) -> None:
        """The engine has nothing to do at `now`, in seconds, after `steps` forward passes: capture if that
        has been so for long enough.

        Not while it is `exporting` its image, which takes seconds (`captures.py` says why not).
        """
        if not self._runners:
            return
        if steps != self._steps:
            self._steps, self._quiet_since = steps, now
        elif now - self._quiet_since >= self._quiet_s and not exporting:
            began = time.perf_counter()
            runners, self._runners[:] = list(self._runners), []
            try:
                for runner in runners:
                    self._capture(runner)
            except Exception as error:
                for runner in runners:
                    runner.decode_cuda_graph_runner = None
                log.warning("decoding goes on without CUDA graphs, capturing failed: %s", words_of(error))
            else:
                log.info("CUDA graphs captured in %.2f s", time.perf_counter() - began)
