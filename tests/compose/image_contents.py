"""What images must not contain: settings, hosts and certificates of the machine that built them."""

import asyncio
import re
import tempfile
from pathlib import Path

import certifi
from tests.compose.base_image import BaseImage
from tests.compose.docker_engine import Engine
from tests.compose.images import BuiltImage
from tests.compose.package_configuration import PackageConfiguration

LOOK_DEADLINE_S = 180.0
# By which a build is told where packages come from; the Dockerfiles set others of pip's in their first stage.
SETTINGS = ("PIP_", "UV_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "_CA_BUNDLE", "SSL_CERT")
FILES = ("/etc/pip.conf", "/etc/xdg/pip", "/root/.pip", "/root/.config/pip", "/root/.cache", "/root/.netrc")
SECRETS = "/run/secrets"
BASE_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
# Prints what is there of FILES, what is in SECRETS, and which small files contain one of the patterns.
LOOK = f"""
for path in {" ".join(FILES)}; do [ ! -s "$path" ] || echo "$path"; done
find {SECRETS} -type f 2> /dev/null
[ -s /patterns ] || exit 0
find / -xdev -path /proc -prune -o -path /sys -prune -o -path /patterns -prune -o \
    -type f -size -2048k -print0 2> /dev/null | xargs -0 grep -lFf /patterns 2> /dev/null
exit 0
"""
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\n(.+?)-----END CERTIFICATE-----", re.DOTALL)


async def left_in_images(
    engine: Engine, images: list[BuiltImage], base: BaseImage, packages: PackageConfiguration
) -> list[str]:
    """What the images have kept of this machine's package configuration, in words. Raises CommandFailed."""
    bundle = packages.bundle.read_text(errors="replace") if packages.bundle else ""
    known = await engine.docker("run", "--rm", "--entrypoint", "cat", base.name, BASE_BUNDLE)
    # certifi's are public too, and parts of some images.
    patterns = [*sorted(packages.hosts), *own_certificates(bundle, known + certifi.contents())]
    with tempfile.TemporaryDirectory(prefix="prism-patterns-") as folder:
        file = Path(folder) / "patterns"
        file.write_text("".join(f"{pattern}\n" for pattern in patterns))
        found = []
        for image in images:
            found += await _told_by(engine, image, packages.hosts)
            found += await _kept_in(engine, image, file)
    return found


async def _told_by(engine: Engine, image: BuiltImage, hosts: frozenset[str]) -> list[str]:
    """What the image's history and its settings say."""
    history, settings = await asyncio.gather(
        engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image.name),
        engine.docker("image", "inspect", "--format", "{{json .Config}}", image.name),
    )
    words = [*SETTINGS, *sorted(hosts)]
    return [
        f"{image.name} names {word} in what it was made by" for word in words if word in history + settings
    ]


async def _kept_in(engine: Engine, image: BuiltImage, patterns: Path) -> list[str]:
    """Files of the image; `patterns` has a line for each string that none may contain."""
    told = await engine.docker(
        *("run", "--rm", "--user", "0", "--network", "none", "--entrypoint", "sh"),
        *("--volume", f"{patterns}:/patterns:ro", image.name, "-c", LOOK),
        timeout_s=LOOK_DEADLINE_S,
    )
    return [f"{image.name} contains {line}" for line in told.splitlines()]


def own_certificates(bundle: str, known: str) -> list[str]:
    """A line that tells each certificate of `bundle` from all others, of those that `known` does not have."""
    public = {_body(match) for match in _CERTIFICATE.findall(known)}
    own = [body for match in _CERTIFICATE.findall(bundle) if (body := _body(match)) not in public]
    return sorted({max(body.split("\n")[2:-1] or [body], key=len) for body in own})


def _body(certificate: str) -> str:
    return "\n".join(line.strip() for line in certificate.strip().splitlines())
