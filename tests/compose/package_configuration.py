"""How this machine reaches its package indexes: what a build needs of it, and what no image may contain."""

import ast
import configparser
import os
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.compose.shell import Shell

ASK_DEADLINE_S = 30.0
PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "timeout", "retries", "proxy")
# As variables of the environment they have other names.
SYNONYMS = {"default-timeout": "timeout"}
URL_SETTINGS = ("index-url", "extra-index-url", "proxy")
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
BUNDLES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
# Everybody's, which documentation within packages names.
PUBLIC_HOSTS = frozenset({"pypi.org", "files.pythonhosted.org", "deb.debian.org", "security.debian.org"})


@dataclass(frozen=True)
class PackageConfiguration:
    """`pip` settings by name, several values of one on a line each; `bundle`: certificates, as PEM."""

    pip: dict[str, str]
    bundle: Path | None

    @property
    def hosts(self) -> frozenset[str]:
        """The hosts that are this machine's own affair."""
        urls = [url for name in URL_SETTINGS for url in self.pip.get(name, "").split()]
        named = {urlsplit(url).hostname or "" for url in urls}
        trusted = {host.partition(":")[0] for host in self.pip.get("trusted-host", "").split()}
        return frozenset((named | trusted) - PUBLIC_HOSTS - {""})

    def secrets(self, folder: Path) -> dict[str, Path]:
        """The files for the build, by the ids of BuildKit secrets; what must be written goes to `folder`."""
        files = {}
        if self.pip:
            content = configparser.RawConfigParser()
            content["global"] = self.pip
            files["pip_config"] = folder / "pip.conf"
            files["pip_config"].touch(mode=0o600)
            with files["pip_config"].open("w") as file:
                content.write(file)
        if self.bundle is not None:
            files["ca_bundle"] = self.bundle
        return files


async def read_package_configuration(shell: Shell) -> PackageConfiguration:
    """What pip is told here, by files and by the environment, as far as it is of use in a container."""
    listed = await shell.run(sys.executable, "-m", "pip", "config", "list", timeout_s=ASK_DEADLINE_S)
    settings = pip_settings(listed)
    proxy = next((os.environ[name] for name in PROXIES if os.environ.get(name)), None)
    if proxy and "proxy" not in settings:
        settings["proxy"] = proxy
    return PackageConfiguration(settings, _bundle(listed))


def pip_settings(listed: str) -> dict[str, str]:
    """The settings of `pip config list` that a build can use: none that name folders of this machine."""
    found = {}
    for name, value in _entries(listed):
        if name in URL_SETTINGS:
            value = "\n".join(url for url in value.split() if urlsplit(url).scheme in ("http", "https"))
        if name in PIP_SETTINGS and value:
            found[name] = value
    return found


def _entries(listed: str) -> list[tuple[str, str]]:
    """Name and value of each line `section.name='value'`; what counts more comes later, as pip lists it."""
    entries = []
    for line in listed.splitlines():
        key, equals, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if equals and section in ("global", "install", ":env:"):
            entries.append((SYNONYMS.get(name, name), str(ast.literal_eval(value))))
    return entries


def _bundle(listed: str) -> Path | None:
    named = [value for name, value in _entries(listed) if name == "cert"][::-1]
    named += [os.environ.get(name, "") for name in BUNDLES]
    named.append(ssl.get_default_verify_paths().cafile or "")
    return next((Path(name) for name in named if name and Path(name).is_file()), None)
