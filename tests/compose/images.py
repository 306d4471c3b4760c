"""The images of all services, built as a user builds them, with what this machine needs for downloads."""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.compose.base_image import BaseImage
from tests.compose.docker_engine import Engine
from tests.compose.package_configuration import PackageConfiguration

SERVICES = ("nats", "gateway", "global_scheduler", "model_store", "gpu_worker")
TAG = "compose-test"
BUILD_DEADLINE_S = 1200.0
PRUNE_DEADLINE_S = 120.0
# Of our own engine's cache; enough for the worker's layers twice.
KEPT_CACHE = "24GB"
_STEP = re.compile(r"^#\d+ (?:sha256:\S+ )?\[[^\]]*\d+/\d+\]", re.MULTILINE)
_CACHED = re.compile(r"^#\d+ CACHED", re.MULTILINE)


@dataclass(frozen=True)
class BuiltImage:
    """`steps_cached` of `steps` came from the engine's cache."""

    service: str
    name: str
    seconds: float
    size_bytes: int
    steps: int
    steps_cached: int


async def build_images(
    engine: Engine, base: BaseImage, packages: PackageConfiguration, root: Path
) -> list[BuiltImage]:
    """Build each service's image of the repository at `root`. Raises CommandFailed."""
    built = []
    with tempfile.TemporaryDirectory(prefix="prism-secrets-") as folder:
        secrets = packages.secrets(Path(folder))
        given = [f"--secret=id={name},src={path}" for name, path in secrets.items()]
        for service in SERVICES:
            image = await _build(engine, service, base, given, root)
            print(
                f"   {image.name}: {image.size_bytes / 1e6:,.0f} MB in {image.seconds:.1f} s, "
                f"{image.steps_cached} of {image.steps} steps from the cache",
                flush=True,
            )
            built.append(image)
    return built


async def _build(engine: Engine, service: str, base: BaseImage, secrets: list[str], root: Path) -> BuiltImage:
    name = f"prism/{service}:{TAG}"
    before = (await engine.docker("image", "ls", "--quiet", "--no-trunc", name)).strip()
    began = time.monotonic()
    # The two streams are one, since the tools differ in which of them tells progress.
    told = await engine.shell.run(
        *("sh", "-c", 'exec "$@" 2>&1', "sh", *engine.commands.build, "--progress=plain", *secrets),
        *("--build-arg", f"BASE_IMAGE={base.name}", "--tag", name),
        *("--file", f"deploy/compose/{service}.Dockerfile", "."),
        timeout_s=BUILD_DEADLINE_S,
        folder=root,
    )
    seconds = time.monotonic() - began
    identity, size = (await engine.docker("image", "inspect", "--format", "{{.Id}} {{.Size}}", name)).split()
    if before not in ("", identity):
        await engine.shell.says(engine.commands.docker, "image", "rm", before, timeout_s=PRUNE_DEADLINE_S)
    return BuiltImage(
        service, name, seconds, int(size), len(set(_STEP.findall(told))), len(_CACHED.findall(told))
    )


async def prune_cache(engine: Engine) -> None:
    """Keep the cache of our own engine from growing with each change of the sources. Raises CommandFailed."""
    if engine.own:
        await engine.docker(
            "builder", "prune", "--force", "--keep-storage", KEPT_CACHE, timeout_s=PRUNE_DEADLINE_S
        )
