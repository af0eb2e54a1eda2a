"""Processes that are killed while they save, fit or calibrate: nothing is lost, and what is resumed ends the same.

python -m tests.torch.kills --kills 200
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import schedule

PLAN = schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.4)
IMAGES = models.images(16, (16, 24))


def exits(seed: int, threshold: float) -> tet.ExitingModel:
    """A model with exits of its own."""
    torch.manual_seed(seed)
    vit = models.timm_vit(depth=3, size=(16, 24))
    torch.manual_seed(seed)
    return tet.wrap(vit, PLAN.with_threshold(threshold), num_classes=40).eval()


def state(model: tet.ExitingModel) -> tuple[dict[str, bytes], schedule.Schedule]:
    """What a save holds of it."""
    return {name: value.numpy().tobytes() for name, value in model.exit_heads.state_dict().items()}, model.schedule


def saving(folder: Path) -> tuple[Callable[[], object], Callable[[], bool]]:
    """Two models that save into one folder in turn: what is there is one of them, whole."""
    both = exits(1, 0.3), exits(2, 0.7)
    tet.save(both[0], folder)

    def work() -> None:
        while True:
            for model in reversed(both):
                tet.save(model, folder)

    return work, lambda: state(tet.load(both[0].model, folder)) in [state(model) for model in both]


def fitting(folder: Path) -> tuple[Callable[[], object], Callable[[], bool]]:
    """A fit: resumed, it ends with the weights and the report of one that was not killed."""

    def fit(resume: Path | None) -> tuple[object, str]:
        model = exits(1, 0.3)
        options = {"steps": 60, "check_every": 1, "patches_per_step": 16, "held_out": 0.2, "progress": iter}
        report = tet.fit_exits(model, IMAGES, resume=resume, **options)
        return state(model), str(report)

    wanted = fit(None)
    return lambda: fit(folder), lambda: fit(folder) == wanted


def calibrating(folder: Path) -> tuple[Callable[[], object], Callable[[], bool]]:
    """A calibration: resumed, it ends with the report and the certificate of one that was not killed."""
    settings = [PLAN.with_threshold(threshold) for threshold in (0.9, 0.7, 0.5, 0.3)]

    def calibrate(resume: Path | None) -> object:
        options = {"at_most": 0.9, "preprocessing": "as drawn", "settings": settings, "progress": iter}
        found = tet.calibrate(exits(1, 0.3), IMAGES, resume=resume, **options)
        return found.report, found.certificate, found.before

    wanted = calibrate(None)
    return lambda: calibrate(folder), lambda: calibrate(folder) == wanted


WORK = {"save": saving, "fit": fitting, "calibrate": calibrating}


def run(work: str, *, kills: int, scratch: Path, seed: int = 0) -> int:
    """Kill a process at its work so many times, in one folder that is gone on with, and look what is there.

    Returns:
        How many times the process was killed before it came to its end.
    """
    torch.set_num_threads(1)
    draw, killed, turn = random.Random(seed), 0, 0
    while killed < kills:
        turn += 1
        task, holds = WORK[work](scratch / str(turn))
        started = time.perf_counter()
        for _ in range(4):  # several times on the way to one result
            longest = 0.08 if work == "save" else 0.25
            child = os.fork()
            if child == 0:
                try:
                    task()
                    os._exit(0)
                finally:
                    os._exit(1)
            time.sleep(draw.uniform(0.002, longest))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, f"{work} failed by itself"
            killed += os.WIFSIGNALED(status)
            if work == "save":
                assert holds(), f"after {killed} kills of {work}"
            if killed >= kills:
                break
        assert holds(), f"after {killed} kills of {work}"
        assert time.perf_counter() - started < 600
    return killed


def main() -> None:
    """Kill by the hundred."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many in all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for work, share in {"save": 0.5, "fit": 0.25, "calibrate": 0.25}.items():
            count = run(work, kills=round(share * given.kills), scratch=Path(scratch) / work)
            print(f"{work}: {count} kills, nothing lost", flush=True)


if __name__ == "__main__":
    main()
