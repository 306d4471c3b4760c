"""Logs: one line an event, in one shape for all services."""

import logging
import sys


def configure_logging(service: str, level: str = "INFO") -> None:
    """Log to stderr as 'time LEVEL service logger: message'."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s.%(msecs)03d %(levelname)-7s {service} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    logging.getLogger("httpx").setLevel(logging.WARNING)
