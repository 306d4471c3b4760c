"""What a plan asks for. Each action says why, for people."""

import msgspec


class Activate(msgspec.Struct, frozen=True, tag="activate"):
    """Have `model` serve on `worker` with a KV quota of `kv_bytes`. `footprint_bytes` is what it reserves on
    each of its GPUs; `gpu_ids` are those of the worker's that it goes to, none for all of them. `moves_from`
    is the worker that it will leave once it serves here, empty for none."""

    model: str
    worker: str
    kv_bytes: int
    footprint_bytes: int
    reason: str
    gpu_ids: tuple[int, ...] = ()
    moves_from: str = ""


class Doze(msgspec.Struct, frozen=True, tag="doze"):
    """Have `model` give back its memory on `worker`, after at most `drain_s` for requests in flight."""

    model: str
    worker: str
    drain_s: float
    reason: str


class Freeze(msgspec.Struct, frozen=True, tag="freeze"):
    """Have a dozing `model` give back what its engine still holds of the GPU on `worker`."""

    model: str
    worker: str
    reason: str


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Have `worker` forget `model` and give back all that it holds."""

    model: str
    worker: str
    reason: str


Action = Activate | Doze | Freeze | Release


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a model is not where it should be. The same situation gives the same text. What is `passing`
    ends without anyone doing something about it."""

    model: str
    text: str
    passing: bool = False


class Plan(msgspec.Struct, frozen=True):
    """Actions to start now, each of them possible now, and what stands in the way of others."""

    actions: tuple[Action, ...] = ()
    notes: tuple[Note, ...] = ()
