"""What a check found, and how it is told."""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


class Verdict(enum.StrEnum):
    """ok; slow: works, but not as well as it could; missing; note: a fact that nothing depends on; unknown:
    could not be looked at."""

    OK = "ok"
    SLOW = "slow"
    MISSING = "missing"
    NOTE = "note"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome: what was `found`, how to `fix` it where something is amiss. Without an `essential`
    one no engine runs on a GPU."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""
    essential: bool = False


def fails(findings: Iterable[Finding]) -> bool:
    """Whether something essential is missing."""
    return any(each.essential and each.verdict is Verdict.MISSING for each in findings)


def told(findings: Sequence[Finding]) -> str:
    """For a terminal: a line per finding, its fix below it."""
    width = max(len(each.check) for each in findings)
    lines = []
    for each in findings:
        lines.append(f"{each.verdict:<8} {each.check:<{width}}  {each.found}")
        if each.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {each.fix}")
    missing = [each.check for each in findings if each.essential and each.verdict is Verdict.MISSING]
    if missing:
        lines.append(f"Engines cannot run on a GPU here, missing: {', '.join(missing)}")
    else:
        lines.append("Engines can run on this host's GPUs.")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> dict[str, object]:
    """For programs."""
    return {"ok": not fails(findings), "findings": [asdict(each) for each in findings]}
