"""Life-cycle events, for people and tools: nothing in the system depends on receiving one."""

import msgspec


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """`prism.v1.event.<kind>.<model>`. `kind` is a word such as staging, staged, starting, active, draining,
    dozing, waking, failed, parked, leader. `source` is the instance that says so."""

    kind: str
    model: str
    source: str
    worker: str = ""
    detail: str = ""
    seconds: dict[str, float] = {}
    bytes: dict[str, int] = {}
