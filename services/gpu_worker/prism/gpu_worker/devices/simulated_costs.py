"""What the simulated device's engines are given: how long things take there, and what they say."""

import dataclasses
import enum
from collections.abc import Mapping

import msgspec

from prism.common.errors import ErrorCode, PrismError

PREFIX = "PRISM_SIMULATED_"


class Script(enum.StrEnum):
    """What simulated engines say: see `prism.common.simulated_text`."""

    NUMBERED = "numbered"
    STAMPED = "stamped"


@dataclasses.dataclass(frozen=True, slots=True)
class SimulatedCosts:
    """One engine's cost model. Each field is read from PRISM_SIMULATED_<FIELD>.

    A step either prefills up to the chunk size of prompt tokens, which takes `prefill_fixed_ms` beside what
    the tokens take, or decodes one token of each running request; a rate of 0 tokens/s, and a time of 0, cost
    nothing. `context_bytes` are counted for an engine until it is frozen, as a CUDA context's would be.
    `printable_id` is the id of the token "!" in the model's tokenizer, from which on the printable ASCII
    characters follow in order, as they do in byte-level BPE (6 in the tiny models, 0 in most others).
    """

    prefill_tokens_per_s: float = 10_000.0
    prefill_fixed_ms: float = 0.0
    decode_step_ms: float = 20.0
    start_ms: float = 50.0
    doze_ms: float = 10.0
    wake_ms: float = 50.0
    freeze_ms: float = 100.0
    thaw_ms: float = 50.0
    kv_bytes_per_token: int = 2048
    context_bytes: int = 0
    printable_id: int = 6
    script: Script = Script.NUMBERED

    def prefill_s(self, tokens: int) -> float:
        """Seconds that a step with so many prompt tokens takes."""
        per_token_s = 1.0 / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0
        return self.prefill_fixed_ms / 1000 + tokens * per_token_s

    @property
    def decode_s(self) -> float:
        """Seconds that a decoding step takes, whatever the size of its batch."""
        return self.decode_step_ms / 1000


def costs_from(environment: Mapping[str, str]) -> SimulatedCosts:
    """The cost model that `environment` describes.

    Raises PrismError(invalid_request) that names the variable at fault.
    """
    given: dict[str, object] = {}
    for field in dataclasses.fields(SimulatedCosts):
        variable = PREFIX + field.name.upper()
        if variable not in environment:
            continue
        try:
            given[field.name] = msgspec.convert(environment[variable], field.type, strict=False)
        except msgspec.ValidationError as error:
            raise PrismError(
                ErrorCode.INVALID_REQUEST, f"{variable}={environment[variable]!r}: {error}", param=variable
            ) from error
        value = given[field.name]
        if isinstance(value, int | float) and not 0 <= value < float("inf"):
            raise PrismError(
                ErrorCode.INVALID_REQUEST, f"{variable}={value}: must be a number from 0 on", param=variable
            )
    return SimulatedCosts(**given)  # type: ignore[arg-type]  # converted to each field's type above
