"""`python -m prism.gpu_worker doctor`, really run; what it says of this host depends on the host."""

import json
import subprocess
import sys

from prism.gpu_worker.doctor.findings import Finding, Verdict, as_json, fails, told

DEADLINE_S = 120


def test_it_examines_this_host_and_its_status_goes_by_what_is_missing() -> None:
    command = [sys.executable, "-m", "prism.gpu_worker", "doctor", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    said = json.loads(run.stdout)
    checks = {finding["check"] for finding in said["findings"]}
    assert {"driver", "CUDA driver", "torch", "sglang", "kvcached", "kvcached's patch", "memfd"} <= checks
    missing = [each for each in said["findings"] if each["essential"] and each["verdict"] == "missing"]
    assert run.returncode == (1 if missing else 0)
    assert said["ok"] is not bool(missing)
    assert all(finding["fix"] for finding in missing)


def test_a_line_each_the_fix_below_and_the_sum_last() -> None:
    findings = [
        Finding("driver", Verdict.MISSING, "none", "install one", essential=True),
        Finding("MPS", Verdict.NOTE, "not installed"),
    ]
    lines = told(findings).splitlines()
    assert lines[0].split() == ["missing", "driver", "none"]
    assert lines[1].strip() == "-> install one"
    assert lines[-1] == "Engines cannot run on a GPU here, missing: driver"


def test_what_is_not_essential_does_not_fail() -> None:
    slow = [Finding("freezing", Verdict.SLOW, "none", "newer driver")]
    assert not fails(slow)
    assert as_json(slow)["ok"] is True
