"""Logs: one line an event, in one shape for all services.

What a line is about stands at its end as key=value (rid, model, worker, ...), or in fields of its own where
lines are JSON: all that happened to a request or to a model is found with one search.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_BARE = re.compile(r"[^\s=\"]+")


def about(**names: str) -> dict[str, dict[str, str]]:
    """For the `extra` of a log call: what its line is about. Empty names are left out."""
    return {"about": {key: name for key, name in names.items() if name}}


def configure_logging(service: str, level: str = "INFO", log_format: str = "text", **names: str) -> None:
    """Log to stderr as `service`, as text or as JSON; `names` (of an instance, say) stand in every line."""
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter((JsonFormatter if log_format == "json" else TextFormatter)(service, names))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # Its errors reach us as exceptions and by the error callback of the bus.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    logging.getLogger("httpx").setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """'time LEVEL service logger: message key=value ...'."""

    def __init__(self, service: str, names: Mapping[str, str]) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s {service} %(name)s: %(message)s", datefmt="%H:%M:%S"
        )
        self._names = names

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback, which follows on lines of its own."""
        pairs = (f" {key}={_quoted(name)}" for key, name in _names(record, self._names).items())
        return super().formatMessage(record) + "".join(pairs)


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, service, logger, message, names, and a traceback if any."""

    def __init__(self, service: str, names: Mapping[str, str]) -> None:
        super().__init__()
        self._service = service
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        """The whole line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **_names(record, self._names),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _names(record: logging.LogRecord, of_service: Mapping[str, str]) -> dict[str, str]:
    return {**getattr(record, "about", {}), **of_service}


def _quoted(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False)
