"""The gateway's image holds no engine."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.core


def test_gateway_pulls_in_neither_torch_nor_sglang_nor_transformers() -> None:
    heavy = "{'torch', 'sglang', 'transformers', 'numpy'}"
    code = f"import sys, prism.gateway.__main__; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
