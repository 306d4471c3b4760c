"""Life-cycle events, for people and tools: nothing in the system depends on receiving one."""

import msgspec


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """`prism.v1.event.<kind>.<model>`: `kind` is a word, `source` the instance that says it.

    Of a model: a state entered (staging, starting, active, draining, dozing, waking, failed, cold), a command
    done with its seconds, by what the model is then (activated, dozed, froze, released), moving and moved (to
    `worker`; `detail` says whence), progress, staged, evicted, retried. Of the system, with no model: arrived
    and left (a service, named in `detail`), lost (a worker), leader.
    """

    kind: str
    model: str
    source: str
    worker: str = ""
    detail: str = ""
    seconds: dict[str, float] = {}
    bytes: dict[str, int] = {}
