"""Exit policies: which tokens exit at a given block; small and composable.

    policy = ConfidenceAbove(0.95).retaining(per_class=5)
    leave = policy(Evidence(logits, image=image, images=8))

A policy is a frozen dataclass; `&`, `|`, `~`, `.retaining` and `.with_minimum` make policies of policies. Its
thresholds are data, floats or arrays without axes or `PerClass`, and `with_threshold` exchanges them. A policy of your
own is a dataclass with one method, `leaves`, or, if it compares a score with a threshold, a `ThresholdPolicy`:

    @dataclass(frozen=True)
    class CertainSky(Policy):
        threshold: float

        def leaves(self, evidence):
            return (evidence.label == 0) & (evidence.confidence > self.threshold)
"""

from tokenexit.policies._plain import from_dict, to_dict
from tokenexit.policies.evidence import DIRECTIONS, Evidence
from tokenexit.policies.kinds import (
    KINDS,
    BatchBudget,
    Budget,
    ConfidenceAbove,
    EntropyBelow,
    ErrorBelow,
    GateBelow,
    MarginAbove,
    NeighboursAgree,
    Patience,
)
from tokenexit.policies.policy import PerClass, Policy, Threshold, ThresholdPolicy, always, never

__all__ = [
    "DIRECTIONS",
    "KINDS",
    "BatchBudget",
    "Budget",
    "ConfidenceAbove",
    "EntropyBelow",
    "Evidence",
    "ErrorBelow",
    "GateBelow",
    "MarginAbove",
    "NeighboursAgree",
    "Patience",
    "PerClass",
    "Policy",
    "Threshold",
    "ThresholdPolicy",
    "always",
    "from_dict",
    "never",
    "to_dict",
]
