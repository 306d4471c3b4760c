"""What an engine process logs: SGLang's warnings alarm nobody, its errors and ours do."""

import logging
import subprocess
import sys

import pytest

pytestmark = pytest.mark.core

LOG = """
import logging
from prism.gpu_worker.engine_logs import configure_engine_logging
configure_engine_logging()
logging.getLogger("sglang.srt").warning("a setting")
logging.getLogger("sglang.srt").error("a fault")
logging.getLogger("prism").warning("ours")
"""


def test_warnings_of_sglang_are_information() -> None:
    told = subprocess.run([sys.executable, "-c", LOG], capture_output=True, text=True, timeout=30, check=True)
    levels = [line.split()[1] for line in told.stderr.splitlines()]
    assert levels == [logging.getLevelName(level) for level in (logging.INFO, logging.ERROR, logging.WARNING)]
