"""Plans for models with exits after blocks 2, 3 and 4 of 6."""

import pytest

from tokenexit import policies, schedule
from tokenexit.carries import Feature
from tokenexit.schedule import Exit, Merge, Schedule

PLANS = {
    "neighbours": schedule.neighbours(radius={2: 1, 3: 1, 4: 0}, threshold=0.4, per_class=1),
    "dtop": schedule.dtop(after=(2, 4), threshold=0.5, per_class=2),
    "entropy or margin": Schedule((Exit(2, policies.EntropyBelow(0.3) | policies.MarginAbove(0.8)),)),
}
FEATURES = {
    "dovit": schedule.dovit(after=(2, 4), threshold=0.5),
    "dovit, nothing folded": schedule.dovit(after=(2, 3, 4), threshold=0.6, fold_above=None),
    "paumer": schedule.paumer(after=(2, 4), threshold=0.4),
    "paumer, a budget": schedule.paumer(keep={2: 0.6, 3: 0.4, 4: 0.1}),
    "rejoining for the last block": Schedule(
        schedule.paumer(after=(2, 4), threshold=0.4).exits, Feature("last block", fold_above=0.05)
    ),
    "all leave, and rejoin for the last block": Schedule((Exit(3, policies.always()),), Feature("last block")),
    "all leave": Schedule((Exit(3, policies.always()),), Feature()),
}
CELLS = {
    "neighbours": schedule.neighbours(radius={2: 1, 3: 1, 4: 0}, threshold=0.55, per_class=0, cell=2),
    "wide": schedule.neighbours(radius={2: 0, 4: 0}, threshold=0.6, per_class=1, cell=9),
    "dtop": Schedule(schedule.dtop(after=(2, 4), threshold=0.7, per_class=0).exits, cell=3),
    "paumer": Schedule(schedule.paumer(after=(2, 4), threshold=0.6).exits, Feature("last block"), cell=2),
}
ALL = {
    **PLANS,
    **FEATURES,
    **{f"cells: {name}": plan for name, plan in CELLS.items()},
    "dense": schedule.dense(),
    "truncated": schedule.truncated(after=3),
    "budget": Schedule((Exit(2, policies.Budget(0.5)), Exit(4, policies.BatchBudget(0.2)))),
    "patience": Schedule((Exit(2, policies.Patience(1)), Exit(3, policies.Patience(1)))),
    "at least": Schedule((Exit(2, policies.ConfidenceAbove(0.2).with_minimum(per_image=4)),)),
    "per class": schedule.dtop(after=(2, 4), threshold=policies.PerClass((0.3, 0.5, 0.7, 0.9, 0.4))),
}
BARE = {name: plan for name, plan in ALL.items() if getattr(plan.carry, "fold_above", None) is None}
"""What a host without prefix tokens can follow: nothing is folded into one."""

ONE_BY_ONE = {name: plan for name, plan in ALL.items() if name != "budget"}
"""What decides each image by itself."""


SIMILAR = (Merge(1, 2, 0.9), Merge(3, 4, 0.8))
MERGING = {
    "similar": Schedule(merges=SIMILAR),
    "agreed, then exits": Schedule(
        (Exit(4, policies.NeighboursAgree(0.5, radius=1).retaining(per_class=1)),),
        merges=(Merge(1, 2, 0.9), Merge(2, 4, 0.2, policies.NeighboursAgree(0.3, radius=1))),
    ),
    "exits, then merges": Schedule((Exit(2, policies.ConfidenceAbove(0.6)),), merges=(Merge(3, 4, 0.7),)),
    "both at once": Schedule(
        (Exit(3, policies.ConfidenceAbove(0.6)),), merges=(Merge(3, 4, agreed=policies.ConfidenceAbove(0.4)),)
    ),
    "features rejoin": Schedule((Exit(3, policies.Budget(0.5)),), Feature("last block"), merges=(Merge(1, 2, 0.9),)),
}
"""Plans that merge after blocks 1 to 3."""


def on(hosts):
    """Each host with each of the plans that it can follow."""
    return pytest.mark.parametrize(
        ("host", "plan"),
        [
            pytest.param(host, plan, id=f"{host.__name__}, {name}")
            for host, plans in hosts
            for name, plan in plans.items()
        ],
    )
