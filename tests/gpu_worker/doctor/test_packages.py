"""What doctor says of an engine's packages, from what a probe saw and what is installed."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from prism.gpu_worker.doctor.findings import Finding, Verdict, fails
from prism.gpu_worker.doctor.packages import (
    AUTOPATCH,
    TESTED,
    Probe,
    check_attention_backends,
    check_autopatch,
    check_packages,
    run_probe,
)

WELL = Probe(torch_cuda="13.0", cuda_available=True, pinned_bytes_per_s=55e9)


def verdict(findings: list[Finding], check: str) -> Verdict:
    return next(finding.verdict for finding in findings if finding.check == check)


def test_the_tested_versions_are_fine() -> None:
    findings = check_packages(WELL, lambda package: TESTED[package])
    assert {finding.verdict for finding in findings} == {Verdict.OK}


def test_a_local_version_is_the_same_version() -> None:
    findings = check_packages(WELL, lambda package: TESTED[package] + "+cu130")
    assert verdict(findings, "torch") is Verdict.OK


def test_another_version_is_told_but_does_not_fail() -> None:
    findings = check_packages(WELL, lambda package: "9.9")
    assert verdict(findings, "sglang") is Verdict.SLOW
    assert not fails(findings)


def test_a_package_that_is_not_installed_fails() -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    assert fails(check_packages(WELL, absent))


@pytest.mark.parametrize(
    ("probe", "found"),
    [
        (Probe(torch_cuda=None), "built without CUDA"),
        (Probe(torch_cuda="13.0", cuda_available=False), "reaches no GPU"),
        (Probe(torch_cuda="13.0", cuda_available=True, kvcached="ImportError: libcuda.so.1"), "libcuda"),
        (Probe(error="exit status 1: no torch"), "no torch"),
    ],
)
def test_what_the_probe_could_not_do_fails_with_its_reason(probe: Probe, found: str) -> None:
    findings = check_packages(probe, lambda package: TESTED[package])
    assert fails(findings)
    assert any(found in finding.found for finding in findings if finding.verdict is Verdict.MISSING)


def test_the_patch_must_lie_in_site_packages(tmp_path: Path) -> None:
    missing = check_autopatch(tmp_path)
    assert missing.verdict is Verdict.MISSING
    assert missing.essential
    assert str(tmp_path) in missing.fix
    (tmp_path / AUTOPATCH).write_text("import kvcached.autopatch\n")
    assert check_autopatch(tmp_path).verdict is Verdict.OK


def test_the_chosen_attention_backend_must_be_there() -> None:
    assert check_attention_backends("triton").verdict is Verdict.OK
    other = check_attention_backends("telepathy")
    assert other.verdict is Verdict.MISSING
    assert "triton" in other.fix


def test_the_probe_runs_and_says_what_this_host_has() -> None:
    probe = run_probe()
    assert probe.error == ""
    assert probe.torch_cuda is not None
    assert (probe.pinned_bytes_per_s is None) == (not probe.cuda_available)


def test_a_probe_that_takes_too_long_is_given_up() -> None:
    assert "no answer within 0 s" in run_probe(deadline_s=0.01).error


def test_a_probe_that_fails_says_how_it_ended() -> None:
    assert run_probe(python="/bin/false").error == "exit status 1: nothing said"
