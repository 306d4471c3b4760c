"""Logs of engine processes: in their worker's format, each line with model and worker, at no flood level."""

import io
import logging
import os
import sys
from collections.abc import Iterable

from prism.common.telemetry import configure_logging

LEVEL, FORMAT, WORKER = "PRISM_LOG_LEVEL", "PRISM_LOG_FORMAT", "PRISM_LOG_WORKER"


def logging_environment(level: str, log_format: str, worker: str) -> dict[str, str]:
    """What tells the engine processes of `worker` how to log."""
    return {LEVEL: level, FORMAT: log_format, WORKER: worker}


def configure_engine_logging(model: str = "") -> None:
    """Log as the environment says. With a `model`, what libraries print becomes log lines too."""
    names = {"model": model, "worker": os.environ.get(WORKER, "")}
    level = os.environ.get(LEVEL, "INFO").upper()
    configure_logging(
        "engine",
        level,
        os.environ.get(FORMAT, "text"),
        **{key: name for key, name in names.items() if name},
    )
    # At INFO, SGLang tells of every batch.
    logging.getLogger("sglang").setLevel("INFO" if level == "DEBUG" else "WARNING")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_as_information)
    if model:
        sys.stdout = sys.stderr = LoggedPrints(logging.getLogger("printed"))


def _as_information(record: logging.LogRecord) -> bool:
    # SGLang warns of its settings at each start; what comes to a failure is told by the worker, its owner.
    if record.name.startswith("sglang") and record.levelno == logging.WARNING:
        record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
    return True


class LoggedPrints(io.TextIOBase):
    """A stream whose lines become log lines."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._begun = ""

    def writable(self) -> bool:
        """Of course."""
        return True

    def write(self, text: str) -> int:
        """Log the lines that are whole by now."""
        *lines, self._begun = (self._begun + text).split("\n")
        self._tell(lines)
        return len(text)

    def flush(self) -> None:
        """Nothing: a line that is begun waits for its end."""

    def _tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            # Progress bars rewrite a line again and again; its last form is what is left of it.
            shown = line.rstrip("\r").rpartition("\r")[2].strip()
            if shown:
                self._log.info("%s", shown)
