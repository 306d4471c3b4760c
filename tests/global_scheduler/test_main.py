"""`python -m prism.global_scheduler`: flags, messages, and an orderly end."""

import asyncio
import signal
import sys
from pathlib import Path

import nats.js.errors
import pytest

from prism.cli.nats_server import NatsServer
from prism.common import subjects
from prism.common.bus import Bus

pytestmark = pytest.mark.core


async def run(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "prism.global_scheduler",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(20):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.parametrize("mode", ["static", "elastic"])
async def test_a_policy_that_a_mode_leaves_nothing_to_decide_is_refused(mode: str) -> None:
    status, output = await run("--mode", mode, "--policy", "kvpr")
    assert status == 1
    assert f"--policy kvpr decides nothing in --mode {mode}" in output
    assert "Traceback" not in output


async def test_a_placement_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    path.write_text('[{"model_name": "a"}, {"model_name": "a", "model_path": ""}]')
    status, output = await run("--placement", str(path))
    assert status == 1
    assert "placement.json" in output
    assert "[0].model_path: missing" in output
    assert '[1].model_path: "" is not allowed' in output
    assert '[1].model_name: "a" is the name of [0]' in output
    assert "Traceback" not in output


async def test_sigterm_gives_the_lease_back_and_ends_well(
    fresh_nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    path = tmp_path / "placement.json"
    path.write_text('[{"model_name": "a", "model_path": "/a"}]')
    bucket = await bus.bucket(subjects.BUCKET_LEADER)
    watcher = await bucket.watch(subjects.LEADER_KEY)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "prism.global_scheduler", "--nats", fresh_nats.url, "--placement", str(path)
    )
    async with asyncio.timeout(20):
        async for entry in watcher:
            if entry is not None:
                break
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    await watcher.stop()
    with pytest.raises(nats.js.errors.KeyNotFoundError):
        await bucket.get(subjects.LEADER_KEY)
    assert await (await bus.bucket(subjects.BUCKET_MODELS)).get("spec.a")
