"""Which of this machine's package configuration goes into a build, and what must not come out of it."""

from configparser import RawConfigParser
from pathlib import Path

import pytest
from tests.compose.base_image import mirror
from tests.compose.image_contents import own_certificates
from tests.compose.package_configuration import PackageConfiguration, pip_settings

pytestmark = pytest.mark.core

LISTED = r"""
global.cert='/etc/ssl/certs/all.crt'
global.constraint='/etc/constraints.txt'
global.extra-index-url='file:///opt/simple https://two.example/simple\nhttps://three.example/simple'
global.find-links='/opt/wheels'
global.index-url='https://name:word@one.example/simple'
install.trusted-host='one.example:8443'
freeze.timeout='1'
:env:.default-timeout='180'
"""


def certificate(letter: str) -> str:
    lines = "\n".join(letter * 64 + str(number) for number in range(5))
    return f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n"


def test_what_a_build_can_use_is_taken_and_folders_of_this_machine_are_not() -> None:
    assert pip_settings(LISTED) == {
        "extra-index-url": "https://two.example/simple\nhttps://three.example/simple",
        "index-url": "https://name:word@one.example/simple",
        "trusted-host": "one.example:8443",
        "timeout": "180",
    }
    assert pip_settings("global.extra-index-url='file:///opt/simple'") == {}


def test_later_settings_win() -> None:
    assert pip_settings("global.timeout='1'\n:env:.timeout='2'") == {"timeout": "2"}


def test_own_hosts_are_told_from_everybodys() -> None:
    packages = PackageConfiguration(pip_settings(LISTED), None)
    assert packages.hosts == {"one.example", "two.example", "three.example"}
    assert not PackageConfiguration({"index-url": "https://pypi.org/simple"}, None).hosts


def test_pip_reads_the_secret_as_it_was_meant(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    files = PackageConfiguration(pip_settings(LISTED), bundle).secrets(tmp_path)
    assert files["ca_bundle"] == bundle
    assert files["pip_config"].stat().st_mode & 0o077 == 0
    read = RawConfigParser()
    read.read(files["pip_config"])
    assert dict(read["global"]) == pip_settings(LISTED)
    assert PackageConfiguration({}, None).secrets(tmp_path) == {}


def test_certificates_that_only_this_machine_has_are_found_by_a_line_of_theirs() -> None:
    bundle = certificate("A") + certificate("B")
    (line,) = own_certificates(bundle, certificate("A"))
    assert line in certificate("B")
    assert own_certificates(bundle, bundle) == []


def test_the_debian_mirror_is_the_one_that_this_machine_uses(tmp_path: Path) -> None:
    (tmp_path / "one.sources").write_text(
        "Types: deb\nURIs: http://mirror.example/debian-security\n\nURIs: http://mirror.example/debian/\n"
    )
    assert mirror((tmp_path / "missing", tmp_path)) == ["http://mirror.example/debian"]
    assert mirror((tmp_path / "missing",)) == []
