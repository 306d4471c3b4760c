"""Which queued requests of a worker start now: the interface, and the policies by name."""

from prism.scheduling.admission.first_come import FirstComeAdmission
from prism.scheduling.admission.policy import (
    Admission,
    AdmissionPolicy,
    EngineCapacity,
    GpuWork,
    QueuedRequest,
)

policies: dict[str, type[AdmissionPolicy]] = {"first_come": FirstComeAdmission}

__all__ = [
    "Admission",
    "AdmissionPolicy",
    "EngineCapacity",
    "FirstComeAdmission",
    "GpuWork",
    "QueuedRequest",
    "policies",
]
