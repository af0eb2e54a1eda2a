"""Whether certified settings hold on the frames that they were not certified on."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import tokenexit_torch as tet
from examples import metrics, shell
from examples.camvid import common, data, guarantee
from tests.examples.strips import CAMVID, needs_data
from tests.saved import edit
from tokenexit import schedule
from tokenexit.heads import MLP

LADDER = tuple(schedule.neighbours(threshold=threshold) for threshold in (0.9, 0.7))
CUT = schedule.truncated(after=6)


def table(losses, costs=(0.8, 0.6, 0.7)):
    every = np.ones((len(losses), 1)) * np.array(costs)
    return guarantee.Table((*LADDER, CUT), ((0, 1), (2,)), np.array(losses), every, np.array([0.001, 0.004, 0.01]))


def test_halves_that_are_drawn_hold_frames_once_and_stretches_are_whole():
    halves = guarantee.random_halves(9, 30, seed=0)
    assert {len(set(half.tolist())) for half in halves} == {4}
    assert {frame for half in halves for frame in half.tolist()} == set(range(9))
    repeated = guarantee.with_repeats(9, 30, seed=0)
    assert {len(half) for half in repeated} == {4}
    assert min(len(set(half.tolist())) for half in repeated) < 4
    assert {frame for half in repeated for frame in half.tolist()} == set(range(9))
    assert [half.tolist() for half in guarantee.stretches(5)] == [[0, 1], [1, 2], [2, 3], [3, 4]]


def test_what_the_losses_are_like_in_half_of_a_video_says_nothing_of_the_other():
    calm = [0.0, 0.0, 1.0]
    losses = [calm] * 100 + [[0.0, 0.6, 1.0]] * 100  # the bolder setting fails in the second half
    drawn = guarantee.held(table(losses), guarantee.random_halves(200, 20, 0), at_most=0.2, confidence=0.9)
    assert (drawn.halves, drawn.wrong, drawn.never, drawn.cut) == (20, 0, 0, 0)
    assert (drawn.saving, drawn.loss, drawn.most, drawn.lost) == pytest.approx((0.2, 0.0, 0.0, 0.001))
    found = guarantee.held(table(losses), guarantee.stretches(200), at_most=0.2, confidence=0.9)
    assert found.halves == 101
    assert 1 < found.wrong < 40  # those of which few frames are of the second half
    assert found.most == pytest.approx(0.3)
    share = found.wrong / 101
    assert (found.saving, found.loss) == pytest.approx((0.2 + 0.2 * share, 0.3 * share))
    assert found.lost == pytest.approx(0.001 + 0.003 * share)
    assert found.wrong_on_others == found.wrong  # nearly all of the others are of the half that fails


def test_networks_cut_short_and_never_are_counted():
    cheap = guarantee.held(table([[0.0, 0.9, 0.0]] * 60), guarantee.stretches(60), at_most=0.2, confidence=0.9)
    assert (cheap.cut, cheap.never, cheap.wrong) == (31, 0, 0)
    exits = guarantee.exits_alone(table([[0.0, 0.9, 0.0]] * 60))
    assert (exits.settings, exits.chains, exits.losses.shape, len(exits.lost)) == (LADDER, ((0, 1),), (60, 2), 2)
    alone = guarantee.held(exits, guarantee.stretches(60), at_most=0.2, confidence=0.9)
    assert (alone.cut, alone.never, alone.saving) == (0, 0, pytest.approx(0.2))
    none = guarantee.held(table([[0.9, 0.9, 0.9]] * 60), guarantee.stretches(60), at_most=0.2, confidence=0.9)
    assert (none.never, none.saving, none.most) == (31, 0.0, 0.0)


def call(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["guarantee", *map(str, options)])
    guarantee.main()


@needs_data
def test_settings_are_run_once_and_compared_by_the_book(ready_for_strips, strips, tmp_path, monkeypatch, capsys):
    exits = tmp_path / "exits"
    vit, head, ready = common.ready_model(ready_for_strips, data.SIZE)
    model = tet.wrap(vit, common.wide_then_narrow((4, 8)), head=head, exit_heads=MLP(ready[4][1].out_features)).eval()
    for after, own in model.exit_heads.items():
        own.load_state_dict(ready[int(after)].state_dict())
    tet.save(model, exits)
    plans = (model.schedule.with_threshold(0.9), schedule.truncated(after=8))
    monkeypatch.setattr(tet, "default_settings", lambda _: (plans, ((0,), (1,))))
    file = tmp_path / "new" / "held.json"
    options = [
        "--init",
        ready_for_strips,
        "--fitted",
        exits,
        "--data",
        CAMVID,
        "--json",
        file,
        "--limit",
        24,
        "--draws",
        7,
    ]
    levels = ["--alpha", 0.4, "--confidence", 0.8]
    call(monkeypatch, *options, *levels)
    printed = capsys.readouterr().out
    assert "| 40 % | 7 with repeats | 0.0 %, 0.0 % | 0 |" in printed
    assert "| 40 % | 7 drawn | 0.0 %, 0.0 % | 0 |" in printed
    assert "| 40 % | 13 one stretch | 0.0 %, " in printed
    assert "| exits, confidence 0.9 |" in printed
    assert "| cut after 8 |" in printed
    found = json.loads(file.read_text())
    every = [frame for frame in data.frames(CAMVID, "test") if frame.sequence == "Seq05VD"]
    frames = [every[place] for place in np.linspace(0, len(every) - 1, 24, dtype=int)]
    with torch.inference_mode():
        (images, labels), *_ = data.Batches(frames, 24)
        maps = [model(images, schedule=plan).upsample(data.SIZE).argmax(1) for plan in (schedule.dense(), *plans)]
    for row, one in zip(found["settings"], maps[1:], strict=True):
        np.testing.assert_allclose(row["losses"], (one != maps[0]).double().mean(dim=(1, 2)), atol=1e-4)
        confusion = metrics.confusion_matrix(one, labels, classes=len(data.CLASSES), ignore=data.IGNORE)
        assert row["miou"] == pytest.approx(metrics.mean_iou(confusion), abs=1e-4)
    losses = np.array(found["settings"][0]["losses"])
    stretches = [losses[first : first + 12].mean() for first in range(13)]
    assert f"| {100 * min(stretches):.2f} to {100 * max(stretches):.2f} % |" in printed.splitlines()[2]
    monkeypatch.setattr(guarantee, "run", lambda *_: pytest.fail("it has been run"))
    call(monkeypatch, *options, *levels)
    assert capsys.readouterr().out == printed
    other = tmp_path / "other"
    shutil.copytree(exits, other)
    edit(other)
    (other / "exits.json").write_text((other / "exits.json").read_text().replace("0.9", "0.8"))
    for words, change in (
        ("`--json` must be a new file or of the same frames", ["--limit", 26, *levels]),
        ("`--json` must be a new file or of the same fitted", ["--fitted", other, *levels]),
        ("`--fitted` must be a folder of exits, got", ["--fitted", tmp_path, *levels]),
        ("`--alpha` and `--confidence` must be such that half of the frames, 12, are at least", ["--alpha", 0.02]),
        ("`--sequence` must be one of", ["--sequence", "nowhere"]),
        ("`--draws` must be at least 1, got 0", ["--draws", 0]),
    ):
        monkeypatch.setattr(common, "saved_model", lambda *_, **__: model)
        with pytest.raises(shell.UsageError, match=words):
            call(monkeypatch, *options, *change)
    file.write_text("[]")
    with pytest.raises(shell.UsageError, match="`--json` must be a new file or results of this script"):
        call(monkeypatch, *options, *levels)
