"""What one model's engine has shown while it served: speeds, lengths, and promises kept. No clock, no I/O."""

from prism.common.messages.generation import GenerateRequest
from prism.common.messages.models import ModelSpec
from prism.scheduling.admission.expected_output import ExpectedOutput
from prism.scheduling.admission.prefill_cost import UNBOUNDED_PASS, passes
from prism.scheduling.admission.rates import PrefillRate, StepTime

QUEUE_WEIGHT = 0.2
LEAST_OBJECTIVE_S = 0.001


def objective_s(told_ms: float | None) -> float | None:
    """In seconds; None without one. Shares of an objective are computed with, so it is never close to 0,
    whatever the bus or a placement file brings."""
    return max(LEAST_OBJECTIVE_S, told_ms / 1000) if told_ms else None


class Objectives:
    """What one request was promised, in seconds; None without a promise. Its own count, else its model's."""

    __slots__ = ("tpot_s", "ttft_s")

    def __init__(self, request: GenerateRequest, spec: ModelSpec) -> None:
        self.ttft_s = objective_s(request.ttft_slo_ms or spec.ttft_slo_ms)
        self.tpot_s = objective_s(request.tpot_slo_ms or spec.tpot_slo_ms)


class ServingRecord:
    """Fed by the worker's queue; read for admission and for load reports. Times on the caller's clock."""

    def __init__(self) -> None:
        self.expected = ExpectedOutput()
        self.prefill = PrefillRate()
        self.step = StepTime()
        self.step_alone = StepTime()
        self.queue_s = 0.0
        self.requests = 0
        self.ttft_met = 0
        self.ttft_missed = 0
        self.tpot_met = 0
        self.tpot_missed = 0
        self._prefilled_at = 0.0
        self._decoded_at: float | None = None
        self._decoded_steps = 0

    def released(self, waited_s: float) -> None:
        """A request went to the engine after so long a wait."""
        self.queue_s += QUEUE_WEIGHT * (waited_s - self.queue_s)

    def stepped(
        self,
        now: float,
        steps: int,
        prefilled: tuple[int, float] | None,
        *,
        decoded: bool,
        at_work: int = 1,
        pass_tokens: int = UNBOUNDED_PASS,
        held_back: bool = False,
    ) -> None:
        """The engine spoke after its step number `steps`. `prefilled`: prompts are done that had so many
        tokens to prefill together and the first of which was released at that time, in passes of up to
        `pass_tokens`; `decoded`: others got a token. So many engines were `at_work` on the GPU, which take
        turns: alone a step would have taken that part of the time. A prefill that was `held_back`, by weights
        that were not there yet, says little of how fast the engine is."""
        if prefilled is not None:
            tokens, released_at = prefilled
            seconds = now - max(released_at, self._prefilled_at)
            # A rough guess is better than none: some models are only asked when they sleep.
            if not held_back or not self.prefill.known:
                self.prefill.observe(tokens, seconds, passes(tokens, pass_tokens))
            self._prefilled_at = now
        elif decoded and self._decoded_at is not None and steps == self._decoded_steps + 1:
            self.step.observe(now - self._decoded_at)
            self.step_alone.observe((now - self._decoded_at) / max(1, at_work))
        if decoded or prefilled is not None:
            self._decoded_at = now
            self._decoded_steps = steps

    def first_token(self, ttft_s: float, objectives: Objectives) -> None:
        """A request had its first token so long after it came."""
        if objectives.ttft_s is not None:
            if ttft_s <= objectives.ttft_s:
                self.ttft_met += 1
            else:
                self.ttft_missed += 1

    def never_began(self, objectives: Objectives) -> None:
        """A request ran out of time before its first token."""
        if objectives.ttft_s is not None:
            self.ttft_missed += 1

    def finished(self, tokens: int, decode_s: float, objectives: Objectives) -> None:
        """A request ended by itself, `decode_s` after its first token, with so many tokens."""
        self.requests += 1
        self.expected.finished(tokens)
        if objectives.tpot_s is not None and tokens > 1:
            if decode_s / (tokens - 1) <= objectives.tpot_s:
                self.tpot_met += 1
            else:
                self.tpot_missed += 1
