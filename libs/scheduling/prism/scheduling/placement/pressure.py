"""How hard a model presses on a GPU, in KV cache and in seconds of work, both against what is promised."""

import math
from typing import NamedTuple

from prism.common.messages.models import ModelSpec
from prism.scheduling.cost import ModelCost
from prism.scheduling.placement.snapshot import ModelView, ResidentModel

DEFAULT_TPOT_S = 0.05
MEAN_SERVICE_S = 0.2
TRUSTED_FACTOR = 2.0
MOST_HEADROOM = 3.0
_TAIL = math.log(100.0) / 2.0
_KNEE = 0.9


class Work(NamedTuple):
    """What one instance asks of each of its GPUs: bytes of KV cache, and seconds of work a second when it is
    batched as much as its objectives allow. `activity` is the share of time in which it computes at all,
    alone and at full speed; `tightness` how much of what its objectives allow it takes then. Of its
    `requests_per_s` each of its GPUs counts its part."""

    kv_bytes: float = 0.0
    compute: float = 0.0
    activity: float = 0.0
    tightness: float = 0.0
    requests_per_s: float = 0.0


NO_WORK = Work()


def work_of(view: ModelView, cost: ModelCost | None, resident: ResidentModel | None, share: float) -> Work:
    """The work of an instance that gets `share` of its model's traffic.

    Little's law gives the sequences that decode at a time when each token takes just as long as its objective
    allows: that many share a step, and hold KV cache. Prefill counts for more the nearer its duration is to
    the objective for the first token: at utilisation u requests of e seconds wait longer than d with
    probability exp(-2 d (1-u) / (u e)) (heavy traffic, deterministic service), and 1% of them may.
    """
    measured_kv = float(resident.kv_wanted_bytes) if resident is not None else 0.0
    traffic, spec = view.traffic, view.spec
    arrivals = traffic.arrivals_per_s * share
    prompt, output = traffic.prompt_tokens_per_s * share, traffic.output_tokens_per_s * share
    if arrivals < 1e-6 and output < 1e-6:
        return Work(measured_kv, 0.0)
    tpot_s = spec.tpot_slo_ms / 1000.0 if spec.tpot_slo_ms is not None else DEFAULT_TPOT_S
    tokens_held = (prompt + output / 2.0) / arrivals if arrivals >= 1e-6 else 0.0
    sequences = output * tpot_s
    batch = max(1.0, sequences)
    prefill_s, step_s, kv_token = 0.0, 0.0, 0
    if cost is not None:
        prefill_s = prompt * cost.prefill_token_s + arrivals * cost.prefill_fixed_s
        step_s = cost.decode_step_s(1, 0.0) + (batch - 1.0) * cost.decode_sequence_s
        step_s += batch * tokens_held * cost.decode_kv_token_s
        kv_token = cost.kv_bytes_per_token
    elif view.facts is not None:
        kv_token = 2 * view.facts.kv_elements_per_token // spec.tp_size
    if resident is not None and resident.prefill_tokens_per_s:
        measured_s = prompt / resident.prefill_tokens_per_s
        bound = TRUSTED_FACTOR if cost is not None else math.inf
        prefill_s = min(max(measured_s, prefill_s / bound), prefill_s * bound) if cost else measured_s
    if cost is None and resident is not None and resident.decode_step_s:
        step_s = resident.decode_step_s
    compute = prefill_s * _headroom(spec.ttft_slo_ms, prefill_s, arrivals) + output / batch * step_s
    one_s = step_s if cost is None else cost.decode_step_s(1, tokens_held)
    alone = prefill_s + output * one_s
    return Work(
        max(measured_kv, sequences * tokens_held * kv_token),
        compute,
        alone / (1.0 + alone),
        _tightness(spec, one_s, prefill_s / arrivals if arrivals >= 1e-6 else 0.0, tpot_s),
        arrivals / spec.tp_size,
    )


def _tightness(spec: ModelSpec, step_s: float, prefill_s: float, tpot_s: float) -> float:
    ttft = prefill_s * 1000.0 / spec.ttft_slo_ms if spec.ttft_slo_ms is not None else 0.0
    return max(step_s / tpot_s, ttft)


class Company:
    """Who computes on a GPU, as far as it matters to whose objectives are tightest.

    Engines that compute at once take turns: beside others that compute for the shares a1, a2, ... of the
    time, one takes 1 + a1 + a2 + ... times as long as alone. `strain` is how much of what its objectives
    allow the one takes that is worst off; beyond 1 they can't be kept.
    """

    __slots__ = ("_members", "_tightest", "activity")

    def __init__(self) -> None:
        self.activity = 0.0
        self._members: list[tuple[float, float]] = []
        self._tightest = (0.0, 0.0)

    def join(self, work: Work) -> None:
        """One more."""
        if work.activity > 0.0:
            member = (work.tightness, work.activity)
            self.activity += work.activity
            self._members.append(member)
            self._tightest = max(self._tightest, member)

    def leave(self, work: Work) -> None:
        """One that joined is gone."""
        if work.activity > 0.0:
            member = (work.tightness, work.activity)
            self._members.remove(member)
            self.activity -= work.activity
            if member == self._tightest:
                self._tightest = max(self._members, default=(0.0, 0.0))

    @property
    def strain(self) -> float:
        """See Company; 0 while nobody computes."""
        tightness, own = self._tightest
        return tightness * (1.0 + self.activity - own)

    def strain_with(self, work: Work) -> float:
        """The same with one more."""
        tightness, own = max(self._tightest, (work.tightness, work.activity))
        return tightness * (1.0 + self.activity + work.activity - own)

    def strain_without(self, work: Work) -> float:
        """The same without one that joined."""
        member = (work.tightness, work.activity)
        if member != self._tightest or work.activity <= 0.0:
            tightness, own = self._tightest
            return tightness * (1.0 + self.activity - work.activity - own)
        others = list(self._members)
        others.remove(member)
        tightness, own = max(others, default=(0.0, 0.0))
        return tightness * (1.0 + self.activity - work.activity - own)


def waiting_s(pressure: float) -> float:
    """Seconds that a request probably waits at a GPU under `pressure`: as in a queue with one server below
    0.9, and growing by the same slope beyond, where no queue would be stable."""
    if pressure <= _KNEE:
        return MEAN_SERVICE_S * pressure / (1.0 - pressure)
    at_knee = MEAN_SERVICE_S * _KNEE / (1.0 - _KNEE)
    return at_knee + (pressure - _KNEE) * MEAN_SERVICE_S / (1.0 - _KNEE) ** 2


def pressure_of(kv_wanted: float, kv_space: float, compute: float, strain: float = 0.0) -> float:
    """The worst of a GPU's pressures; infinite where there is no KV cache for those who want it."""
    busiest = compute if compute > strain else strain
    if kv_wanted <= 0:
        return busiest
    return max(kv_wanted / kv_space, busiest) if kv_space > 0 else math.inf


def _headroom(ttft_slo_ms: float | None, prefill_s: float, arrivals: float) -> float:
    if ttft_slo_ms is None or arrivals < 1e-6:
        return 1.0
    each_s = prefill_s / arrivals
    slack_s = ttft_slo_ms / 1000.0 - each_s
    return min(MOST_HEADROOM, 1.0 + _TAIL * each_s / slack_s) if slack_s > 0 else MOST_HEADROOM
