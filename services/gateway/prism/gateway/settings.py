"""The gateway's limits, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What a gateway allows and how long it waits. Times in seconds, sizes in bytes.

    `park_s` bounds one wait for a model to be served somewhere, `deadline_s` the whole request, `accept_s`
    the wait for a worker's word that it has a request, `stall_s` its silence after that, `silence_s` the age
    of a load report from which on its worker counts as gone. `max_losses` is how often in a row, without
    a token between, one request may lose its engine or worker: one that takes every engine down with it must
    not go round for ever.
    """

    max_body_bytes: int = 4 * 1024 * 1024
    body_s: float = 30.0
    deadline_s: float = 300.0
    park_s: float = 120.0
    park_per_model: int = 2000
    park_total: int = 10_000
    accept_s: float = 5.0
    stall_s: float = 20.0
    silence_s: float = 2.5
    max_losses: int = 3
    max_choices: int = 128
    drain_s: float = 30.0
