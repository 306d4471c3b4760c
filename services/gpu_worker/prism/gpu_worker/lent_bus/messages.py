"""What an engine and a lender of a bus say to each other, one datagram each on a Unix socket."""

import msgspec


class Take(msgspec.Struct, frozen=True, tag="take"):
    """Map and pin the image of `nbytes` whose memfd comes beside, in place of another; it is let go of when
    the connection ends. No answer."""

    nbytes: int


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """May I have the bus? Answered by `Begun`."""


class Carry(msgspec.Struct, frozen=True, tag="carry"):
    """Copy parts of the image, each an offset and a size, to the same places of the engine's weights: into
    `nbytes` of GPU memory that begin at `base` there, whose descriptor comes beside. Answered by `Carried`
    after each part, in order."""

    base: int
    nbytes: int
    parts: list[tuple[int, int]]


class End(msgspec.Struct, frozen=True, tag="end"):
    """The bus is the lender's again. No answer."""


ToLender = Take | Begin | Carry | End


class Begun(msgspec.Struct, frozen=True, tag="begun"):
    """The bus is the engine's until `End`; not while the lender's own GPU wakes a model, while another engine
    has it, or while the image is not all pinned."""

    granted: bool


class Carried(msgspec.Struct, frozen=True, tag="carried"):
    """So many parts are there, of all since `Begin`."""

    parts: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Nothing more will be carried, and why."""

    reason: str


FromLender = Begun | Carried | Failed
