"""What a worker and its engine hosts say to each other, and how it travels.

One Unix stream socket an engine: length-prefixed msgpack. The socket is inherited, so nothing is left on
disk, and its end is how each side learns of the other's death.
"""

import enum
import struct

import msgspec

from prism.common.errors import ErrorBody
from prism.common.messages.generation import SamplingParams, TokenLogprob

HEADER = struct.Struct("<I")

PLANNED_NEW_TOKENS = 128
"""An engine starts a request when it has room for its prompt and so many tokens, or all that it may generate
if that is less; when it runs out of room later, it takes the memory back from a request, which goes on once
there is some again."""


class EngineDevice(enum.StrEnum):
    """What an engine computes on."""

    CPU = "cpu"
    CUDA = "cuda"


class EngineOptions(msgspec.Struct, frozen=True):
    """What all engines of a device are told. CUDA graphs are kept for decode batches of
    `decode_graph_sizes`, ascending; none without any. With `defer_graphs` they are captured when the engine
    is idle first, not before it serves. With `prime` an engine answers a request of its own before it serves:
    kernels are compiled and loaded then. A woken engine takes requests `wake_lead_s` seconds before its last
    weights are there: about what launching a prefill takes. Longer, and a prefill that waits would hold up
    those of other models. New tokens of requests that are not streamed are said every `unstreamed_s` seconds.
    In the folder `lent_buses` other GPUs of the node lend theirs to wakes, each at a socket named by its
    UUID; those in `own_gpus` are the engine's own.
    """

    device: EngineDevice = EngineDevice.CPU
    attention_backend: str = ""
    decode_graph_sizes: list[int] = []
    defer_graphs: bool = False
    prime: bool = False
    wake_lead_s: float = 0.15
    unstreamed_s: float = 0.1
    lent_buses: str = ""
    own_gpus: list[str] = []


class StartEngine(msgspec.Struct, frozen=True, tag="start"):
    """Become an engine for this model. Answered by `Progress`, one `WeightsSized`, then `Ready` or `Failed`.

    `kv_bytes` is the first quota of the KV cache, and `kv_cap_bytes` the largest that it may ever get (0: the
    first stays); `weights_bytes` is what the worker has reserved for the weights until they are sized;
    `layout` names the engine image to ask the store for and to make. Under tensor parallelism `rank_layouts`
    has the layout of each rank, and sizes are those of all ranks together. `version` is the one whose weights
    the store is to lend, empty for any.
    """

    call: int
    model: str
    model_path: str
    store_socket: str
    layout: str
    dtype: str
    kv_bytes: int
    max_running_requests: int
    chunked_prefill_tokens: int
    copy_threads: int
    store_deadline_s: float
    weights_bytes: int = 0
    options: EngineOptions = EngineOptions()
    kv_cap_bytes: int = 0
    rank_layouts: list[str] = []
    version: str = ""


class WeightsGranted(msgspec.Struct, frozen=True, tag="weights_granted"):
    """The worker has reserved what `WeightsSized` asked for (or not: `granted` false ends the start)."""

    granted: bool


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Run one request; answered by `TokenOutput`s in `Outputs`: at each token when it is `streamed`, else at
    the first, every now and then, and at the last."""

    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    top_logprobs: int | None
    priority: int
    streamed: bool = True


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop `rid`; a final output follows if it was still running."""

    rid: str


class Doze(msgspec.Struct, frozen=True, tag="doze"):
    """Give back the memory of weights and KV cache, keep everything else. Answered by `Done`."""

    call: int


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """Take the memory again and copy the weights back from the store's image. Answered by `Done`, and by
    `Arrived` after it when the last weights are under way then."""

    call: int


class SetQuota(msgspec.Struct, frozen=True, tag="set_quota"):
    """Let the KV cache take `kv_bytes` from now on. When that is less than it has, cached prefixes are
    evicted first, then the requests of lowest priority wait until there is memory again. Answered by
    `QuotaSet`."""

    call: int
    kv_bytes: int


class PrepareFreeze(msgspec.Struct, frozen=True, tag="prepare_freeze"):
    """Dozing: let go of pinned host memory, which a thaw would pin again all at once, and touch the GPU no
    more until the next message. Answered by `Done`."""

    call: int


ToEngine = StartEngine | WeightsGranted | Generate | Abort | Doze | Wake | SetQuota | PrepareFreeze


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far staging is."""

    done_bytes: int
    total_bytes: int


class WeightsSized(msgspec.Struct, frozen=True, tag="weights_sized"):
    """The model is built without memory behind its weights; this is what they will take."""

    nbytes: int


class RankMemory(msgspec.Struct, frozen=True):
    """A further rank's process, and the file descriptors of its memory there."""

    pid: int
    weights_fd: int
    kv_fd: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine serves. On a CPU, file descriptors name its memory arenas, so that the worker can see for
    itself how much memory stands behind them (`/proc/<pid>/fd/<n>`); on a GPU they are -1.

    `kv_tokens` fit into the first quota. KV memory comes in pages of `kv_page_bytes`; `kv_overhead_bytes` of
    a quota hold no tokens."""

    call: int
    pid: int
    weights_fd: int
    kv_fd: int
    kv_tokens: int
    kv_bytes_per_token: int
    imaged: bool
    seconds: dict[str, float]
    weights_bytes: int = 0
    kv_page_bytes: int = 1
    kv_overhead_bytes: int = 0
    ranks: list[RankMemory] = []


class QuotaSet(msgspec.Struct, frozen=True, tag="quota_set"):
    """The quota that holds now: never more memory than `kv_bytes` is behind the KV cache, which is room for
    `kv_tokens`. More than was asked for where requests could not be made to wait at once; asked again, more
    may be possible. `retracted` requests had to wait for it."""

    call: int
    kv_bytes: int
    kv_tokens: int
    retracted: int = 0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start, and ends."""

    call: int
    error: ErrorBody


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A doze or wake has happened, or not: then `error` is set and the state is what it was before. With
    `under_way` requests may come though the last weights are still being copied."""

    call: int
    seconds: dict[str, float]
    error: ErrorBody | None = None
    under_way: bool = False


class Arrived(msgspec.Struct, frozen=True, tag="arrived"):
    """The weights that were under way when a wake was done are there, or (`error`) never will be."""

    seconds: dict[str, float]
    error: ErrorBody | None = None


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. `finish` is empty until the last: stop, length or abort."""

    rid: str
    tokens: list[int]
    finish: str = ""
    matched_token: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    error: ErrorBody | None = None


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """What one scheduler step produced, and the engine's load after it. `steps` counts forward passes since
    the start: a long prefill shows in it before its first token. `kv_cached_tokens` are those of prefixes
    that could be evicted, beside the ones that requests hold. `unsaid`: the step brought tokens that a later
    message has."""

    outputs: list[TokenOutput]
    running: int
    waiting: int
    kv_used_tokens: int
    steps: int = 0
    kv_cached_tokens: int = 0
    unsaid: bool = False


class Imaged(msgspec.Struct, frozen=True, tag="imaged"):
    """The engine-layout image was deposited in the store (or could not be: `error`)."""

    seconds: float
    error: ErrorBody | None = None


class Dying(msgspec.Struct, frozen=True, tag="dying"):
    """The engine met an error that it cannot live with, and ends; why, for people."""

    reason: str


FromEngine = Progress | WeightsSized | Ready | Failed | Done | Arrived | QuotaSet | Outputs | Imaged | Dying

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def pack(message: ToEngine | FromEngine) -> bytes:
    """`message` with its length in front."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def unpack_to_engine(body: bytes) -> ToEngine:
    """A message for an engine, without its length."""
    return _to_engine.decode(body)


def unpack_from_engine(body: bytes) -> FromEngine:
    """A message of an engine, without its length."""
    return _from_engine.decode(body)


class MessageBuffer:
    """Cuts a byte stream into message bodies."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was received; return the bodies that are complete now."""
        self._bytes += data
        bodies: list[bytes] = []
        position = 0
        while len(self._bytes) - position >= HEADER.size:
            (length,) = HEADER.unpack_from(self._bytes, position)
            if len(self._bytes) - position - HEADER.size < length:
                break
            position += HEADER.size
            bodies.append(bytes(self._bytes[position : position + length]))
            position += length
        del self._bytes[:position]
        return bodies
