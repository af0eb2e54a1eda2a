"""Hostile files, and processes that are killed, in PyTorch: a few of each here, thousands by `make fuzz`."""

from pathlib import Path

import pytest
import torch

import tokenexit_torch as tet
from tests import hostile
from tests.torch import kills, models
from tokenexit import heads, schedule, semantic

PLAN = schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.4)
VIT = models.timm_vit(depth=3, size=(16, 24))
IMAGES = models.images(8, (16, 24))
WORDS = "as drawn"

pytestmark = pytest.mark.usefixtures("unchecked")


def exits(plan=PLAN, seed=1):
    torch.manual_seed(seed)
    return tet.wrap(VIT, plan, num_classes=3, exit_heads=heads.FCN(4)).eval()


def content(module):
    """What can be compared of a loaded model."""
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items() if "blocks" not in name}


def of_exits(folder):
    model = tet.load(VIT, folder)
    return content(model), model.schedule, model.fitted


def of_gates(folder):
    model = tet.load(VIT, folder)
    return content(model), model.schedule


def of_semantic(folder):
    model = tet.load(VIT, folder)
    return content(model), model.plan, model.replaced


def of_certificate(folder):
    return tet.load_certificate(folder, exits(), resolution=(16, 24), preprocessing=WORDS)


def fitted(**options):
    model = exits()
    report = tet.fit_exits(model, IMAGES, steps=8, check_every=4, patches_per_step=8, progress=iter, **options)
    return content(model), str(report)


def calibrated(folder):
    given = {"at_most": 0.9, "preprocessing": WORDS, "progress": iter, "resume": folder}
    found = tet.calibrate(exits(), IMAGES, settings=[PLAN, PLAN.with_threshold(0.2)], **given)
    return found.report, found.certificate, found.before


def interrupted(folder):
    """A fit that has come half the way."""

    def stopping(loop):
        for number, one in enumerate(loop):
            if isinstance(loop, range) and number == 5:
                raise KeyboardInterrupt
            yield one

    model = exits()
    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(
            model, IMAGES, steps=8, check_every=4, patches_per_step=8, held_out=0.2, resume=folder, progress=stopping
        )


def whole(target: str, folder: Path) -> None:
    """A folder that loads."""
    torch.manual_seed(0)
    match target:
        case "exits":
            model = exits()
            model.fitted = ("0" * 32, "1" * 32)
            tet.save(model, folder)
        case "gates":
            tet.save(tet.wrap_gates(VIT, schedule.svit(after=(1, 2)), gates=heads.MLP(4)), folder)
        case "semantic":
            plan = semantic.SemanticPlan(None, (2, 3), None, learned=(2, 2), layer_scale=0.1)
            tet.save(tet.wrap_semantic(VIT, plan, after=0, until=3), folder)
        case "certificate":
            model = exits()
            found = tet.calibrate(model, IMAGES, at_most=0.9, preprocessing=WORDS, settings=[PLAN], progress=iter)
            assert found.certificate is not None
            tet.save_certificate(found.certificate, folder)
        case "fit":
            interrupted(folder)
        case "cache":
            fitted(cache=folder)
        case "calibration":
            calibrated(folder)


# How to load it, how many files here, and how many of ten thousand.
TARGETS = {
    "exits": (of_exits, "exits", 60, 0.35),
    "gates": (of_gates, "gates", 30, 0.12),
    "semantic": (of_semantic, "semantic", 25, 0.12),
    "certificate": (of_certificate, None, 50, 0.2),
    "fit": (lambda folder: fitted(resume=folder, held_out=0.2), None, 12, 0.08),
    "cache": (lambda folder: fitted(cache=folder), None, 8, 0.05),
    "calibration": (calibrated, None, 12, 0.08),
}


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_files_are_refused_or_change_nothing(target, tmp_path):
    load, kind, few, share = TARGETS[target]
    whole(target, tmp_path / "whole")
    count = round(share * hostile.FILES) if hostile.FILES else few
    found = hostile.Trials(tmp_path / "whole", load, kind).run(count, tmp_path)
    assert sum(found.values()) == count
    assert found["refused"] > 0.4 * count
    print(f"{target}: {count} files: {dict(found)}")


@pytest.mark.parametrize("work", kills.WORK)
def test_a_killed_process_loses_nothing(work, tmp_path):
    assert kills.run(work, kills=3, scratch=tmp_path) == 3
