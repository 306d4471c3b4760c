"""Which queued requests of a worker start now: the interface, and the policies by name."""

from prism.scheduling.admission.candidates import Bounds
from prism.scheduling.admission.edf import EdfAdmission
from prism.scheduling.admission.first_come import FirstComeAdmission
from prism.scheduling.admission.moore_hodgson import MooreHodgsonAdmission
from prism.scheduling.admission.policy import (
    PREFILL_WINDOW_S,
    Admission,
    AdmissionPolicy,
    EngineCapacity,
    GpuWork,
    QueuedRequest,
)
from prism.scheduling.admission.prefill_backlog import OpenPass, PrefillBacklog
from prism.scheduling.admission.prefill_cost import PrefillCost
from prism.scheduling.admission.release import SHORTEST_WAIT_S, PrefillBudget

policies: dict[str, type[AdmissionPolicy]] = {
    "moore_hodgson": MooreHodgsonAdmission,
    "edf": EdfAdmission,
    "first_come": FirstComeAdmission,
}
DEFAULT_POLICY = "moore_hodgson"


def make_policy(name: str, bounds: Bounds) -> AdmissionPolicy:
    """The policy of this name, with `bounds` where it bounds waits."""
    return MooreHodgsonAdmission(bounds) if name == "moore_hodgson" else policies[name]()


__all__ = [
    "DEFAULT_POLICY",
    "PREFILL_WINDOW_S",
    "SHORTEST_WAIT_S",
    "Admission",
    "AdmissionPolicy",
    "Bounds",
    "EdfAdmission",
    "EngineCapacity",
    "FirstComeAdmission",
    "GpuWork",
    "MooreHodgsonAdmission",
    "OpenPass",
    "PrefillBacklog",
    "PrefillBudget",
    "PrefillCost",
    "QueuedRequest",
    "make_policy",
    "policies",
]
