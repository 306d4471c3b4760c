"""A demand report as messages that the bus takes: in parts where one would be too large.

Each report replaces its gateway's last one, so a receiver must not take a part for the whole: it takes them
together, and leaves a report out of which a part was lost. The next one comes within a second.
"""

import msgspec

from prism.common.messages.codec import encode
from prism.common.messages.load import DemandReport, ModelDemand

LONGEST_NUMBER = 9_999_999


def split(report: DemandReport, limit: int) -> list[DemandReport]:
    """`report` in messages of at most `limit` bytes: itself, where it fits."""
    if len(encode(report)) <= limit:
        return [report]
    around = len(encode(DemandReport(report.gateway, [ModelDemand("")], LONGEST_NUMBER, LONGEST_NUMBER)))
    room, comma = limit - around, 1
    groups: list[list[ModelDemand]] = []
    used = room
    for entry in report.models:
        size = len(encode(entry)) + comma
        if not groups or used + size > room:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += size
    return [DemandReport(report.gateway, models, part, len(groups)) for part, models in enumerate(groups)]


class DemandParts:
    """Takes reports in, those in parts as they were before. The parts of a gateway come in order."""

    def __init__(self) -> None:
        self._begun: dict[str, DemandReport] = {}

    def take(self, report: DemandReport) -> DemandReport | None:
        """The whole report that `report` is, or is the last part of; None before that, and when one of its
        parts did not come."""
        begun = self._begun.pop(report.gateway, None)
        if report.part > 0:
            if begun is None or (begun.part + 1, begun.parts) != (report.part, report.parts):
                return None
            report = msgspec.structs.replace(report, models=[*begun.models, *report.models])
        if report.part + 1 < report.parts:
            self._begun[report.gateway] = report
            return None
        return report if report.part == 0 else DemandReport(report.gateway, report.models)
