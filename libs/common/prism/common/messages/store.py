"""The model store's two conversations.

Over its Unix socket, with the engines of its node: each message is a `SOCK_SEQPACKET` datagram of JSON;
memfds travel beside a message as SCM_RIGHTS. One connection is one lease: it ends when the connection
does. On the bus (`prism.v1.store.<node>.stage|evict|inspect|list`) with people and schedulers.
"""

import enum

import msgspec

from prism.common.errors import ErrorBody
from prism.common.messages.models import ModelFacts


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in an image: `offset` and `nbytes` in bytes, `dtype` by its torch name without 'torch.'."""

    name: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class ImageKind(enum.StrEnum):
    """`checkpoint`: safetensors as they are on disk. `engine`: in the layout that an engine uses."""

    CHECKPOINT = "checkpoint"
    ENGINE = "engine"


class ImageManifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is where in an image of `nbytes` bytes. `content_hash` is "xxh3-8m:" and the xxh3_128 of the
    xxh3_128 digests of its blocks of 8 MiB.

    `layout` names what an engine image was made with (engine and its version, dtype, tensor-parallel
    rank): an engine takes only an image whose layout is its own.
    """

    fingerprint: str
    kind: ImageKind
    nbytes: int
    tensors: list[TensorEntry]
    layout: str = ""
    content_hash: str = ""


class LeaseRequest(msgspec.Struct, frozen=True, omit_defaults=True, tag="lease"):
    """Stage a model and lend its image. The engine-layout image of `layout` is preferred when there is
    one, else the checkpoint. Answered by any number of `StageProgress`, then `LeaseGranted` with the
    image's memfd beside it (read-only by agreement), or `StoreFailure`: also where the files at `model_path`
    are of another `version` than the one asked for, if one is."""

    model: str
    model_path: str
    layout: str = ""
    version: str = ""


class RoomRequest(msgspec.Struct, frozen=True, tag="room"):
    """Make room for the engine-layout image of a fingerprint, of `nbytes` bytes, that is about to be made.
    Answered by `RoomGranted`. While the connection stays open the room is kept, and then the image in it."""

    model: str
    fingerprint: str
    layout: str
    nbytes: int


class DepositRequest(msgspec.Struct, frozen=True, omit_defaults=True, tag="deposit"):
    """Keep this engine-layout image: its memfd comes beside, then one with the manifest's JSON. `room` names
    what was granted for it, '' if nothing was. Answered by `Deposited` as soon as it can be leased; it is
    written to disk behind that."""

    model: str
    manifest_bytes: int
    room: str = ""


class StageProgress(msgspec.Struct, frozen=True, tag="progress"):
    """Bytes staged so far."""

    done_bytes: int
    total_bytes: int


class LeaseGranted(msgspec.Struct, frozen=True, tag="granted"):
    """The lease holds while the connection does. `manifest_bytes` of JSON (an `ImageManifest`) stand in
    a second memfd, since a manifest outgrows a datagram. `seconds`: time spent staging, 0 if it was there."""

    kind: ImageKind
    nbytes: int
    manifest_bytes: int
    seconds: float


class RoomGranted(msgspec.Struct, frozen=True, tag="room_granted"):
    """There is room, under this name."""

    room: str


class Deposited(msgspec.Struct, frozen=True, tag="deposited"):
    """The image is held, under this content hash."""

    content_hash: str


class StoreFailure(msgspec.Struct, frozen=True, tag="failure"):
    """The store could not do what was asked."""

    error: ErrorBody


StoreReply = StageProgress | LeaseGranted | RoomGranted | Deposited | StoreFailure
StoreRequest = LeaseRequest | RoomRequest | DepositRequest


class StagedImage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image in the store's memory, as `list` shows it. `models` are the names that share its content."""

    fingerprint: str
    kind: ImageKind
    nbytes: int
    models: list[str]
    leases: int
    idle_s: float
    layout: str = ""
    on_disk: bool = False


class StoreReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer to `prism.v1.store.<node>.list`."""

    node: str
    budget_bytes: int
    used_bytes: int
    images: list[StagedImage] = []


class StoreModelRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Payload of `stage`, `evict` and `inspect` on the bus."""

    model: str
    model_path: str = ""


class StoreModelOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer to `stage` and `evict`: bytes now staged or freed."""

    model: str
    nbytes: int = 0
    seconds: float = 0.0
    error: ErrorBody | None = None


class StoreInspection(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer to `inspect`: what the store finds in the model's folder now, and has told the registry. `error`
    instead says why it could not look; what is wrong with the model stands in the facts."""

    facts: ModelFacts | None = None
    error: ErrorBody | None = None
