"""The layers that the design draws hold: who may import whom, and what the gateway drags along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
SERVICES = ("gateway", "global_scheduler", "gpu_worker", "model_store")
LIBRARIES = ("common", "scheduling", "cli", "bench")
HEAVY = ("torch", "sglang", "transformers", "kvcached")


def imports_of_file(file: Path) -> set[str]:
    """Dotted names of all modules that `file` imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def imports_of(folder: Path) -> set[str]:
    """Dotted names of all modules imported anywhere below `folder`."""
    return set().union(*(imports_of_file(file) for file in folder.rglob("*.py")))


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other_service_nor_the_command_line(service: str) -> None:
    foreign = {f"prism.{other}" for other in (*SERVICES, "cli", "bench") if other != service}
    used = imports_of(ROOT / "services" / service)
    assert not [name for name in used if any(name == f or name.startswith(f + ".") for f in foreign)]


def test_decisions_do_no_io() -> None:
    used = imports_of(ROOT / "libs" / "scheduling")
    assert not used & {"asyncio", "socket", "time", "os", "nats", "subprocess", "random", "threading"}


def test_only_the_engine_imports_sglang() -> None:
    for folder in [ROOT / "services" / name for name in SERVICES] + [
        ROOT / "libs" / name for name in LIBRARIES
    ]:
        for file in folder.rglob("*.py"):
            inside = "gpu_worker/engine" in str(file) or file.name == "fork_server.py"
            # The yardstick: SGLang by itself, in a process of its own.
            inside |= str(file).endswith("bench/decode/plain_engine.py")
            if not inside:
                assert not {name for name in imports_of_file(file) if name.split(".")[0] == "sglang"}, file


@pytest.mark.parametrize("service", ["gateway", "global_scheduler", "model_store", "gpu_worker"])
def test_a_service_starts_without_torch(service: str) -> None:
    program = (
        f"import sys, prism.{service}.__main__; print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.strip() == "[]"
