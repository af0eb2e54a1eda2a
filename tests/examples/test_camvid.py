"""The CamVid example, on real frames where they are to be had."""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.swa_utils import AveragedModel

import tokenexit_torch as tet
from examples import metrics, runs, shell, timing
from examples.camvid import common, compare, data, evaluate, gated, insights, methods, report, search, shrunk, train
from tests.examples import narrow as of_narrow
from tests.examples import strips as of_camvid
from tests.examples.strips import CAMVID, DEIT, READY, needs_data
from tokenexit import heads, schedule
from tokenexit.latency import Latency
from tokenexit.schedule import Schedule
from tokenexit.search import Found


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a machine that is busy with something else, threads that wait for one another crawl."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_metrics_agree_with_a_slow_count() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, label = (torch.randint(high, (3, 7, 5), generator=generator) for high in (4, 5))
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for guess, truth in zip(predicted.flatten().tolist(), label.flatten().tolist(), strict=True):
        if truth != 4:
            expected[truth, guess] += 1
    confusion = metrics.confusion_matrix(predicted, label, classes=4, ignore=4)
    assert torch.equal(confusion, expected)
    ious = []
    for one in range(4):
        both = ((predicted == one) & (label == one)).sum().item()
        either = (((predicted == one) | (label == one)) & (label != 4)).sum().item()
        ious.append(both / either)
    assert metrics.iou_per_class(confusion).tolist() == pytest.approx(ious)
    assert metrics.mean_iou(confusion) == pytest.approx(sum(ious) / 4)


def test_metrics_add_up_over_batches() -> None:
    predicted, label = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    whole = metrics.confusion_matrix(predicted, label, classes=3)
    parts = [metrics.confusion_matrix(predicted[i : i + 2], label[i : i + 2], classes=3) for i in (0, 2)]
    assert torch.equal(whole, parts[0] + parts[1])


def test_a_class_that_is_nowhere_does_not_count() -> None:
    confusion = metrics.confusion_matrix(torch.tensor([0, 0]), torch.tensor([0, 9]), classes=3, ignore=9)
    assert metrics.iou_per_class(confusion).isnan().tolist() == [False, True, True]
    assert metrics.mean_iou(confusion) == 1.0


@pytest.mark.parametrize(("predicted", "label", "words"), [
    ([0, 1], [0], "one shape"),
    ([0, 3], [0, 1], r"`predicted` must be in \[0, 3\)"),
    ([0, 1], [0, 7], "`label` must be"),
])  # fmt: skip
def test_metrics_refuse_what_is_no_class(predicted: list[int], label: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metrics.confusion_matrix(torch.tensor(predicted), torch.tensor(label), classes=3)


def tiny_camvid(folder: Path, *, scale: float = 1.0) -> Path:
    """A data folder with one frame: a ramp whose label is its own grey value, modulo 12, in the left half only."""
    for part in ("train", "trainannot"):
        (folder / part).mkdir(parents=True)
    (folder / "train.txt").write_text("/SegNet/CamVid/train/Seq_1.png /SegNet/CamVid/trainannot/Seq_1.png\n")
    label = np.full(data.FRAME, data.IGNORE, dtype=np.uint8)
    label[:, :240] = np.arange(360)[:, None] % 11
    image = np.repeat((label * 20)[..., None], 3, axis=2)
    Image.fromarray(image).save(folder / "train" / "Seq_1.png")
    Image.fromarray(label).save(folder / "trainannot" / "Seq_1.png")
    return folder


def test_evaluation_cuts_the_middle_rows(tmp_path: Path) -> None:
    (frame,) = data.frames(tiny_camvid(tmp_path), "train")
    image, label = data.evaluation_pair(frame)
    assert frame.sequence == "Seq"
    assert image.shape == (3, *data.SIZE)
    assert label.shape == data.SIZE
    assert label[:, 0].tolist() == [row % 11 for row in range(4, 356)]
    assert (label[:, 240:] == data.IGNORE).all()
    expected = (label[0, 0] * 20 / 255 - data.MEAN[0]) / data.STD[0]
    assert image[0, 0, 0].item() == pytest.approx(expected.item(), abs=1e-6)


def test_augmentation_is_seeded_and_keeps_labels_on_their_pixels(tmp_path: Path) -> None:
    (frame,) = data.frames(tiny_camvid(tmp_path), "train")
    pairs = [data.training_pair(frame, np.random.default_rng(seed)) for seed in range(12)]
    again = data.training_pair(frame, np.random.default_rng(3))
    assert torch.equal(pairs[3][0], again[0])
    assert torch.equal(pairs[3][1], again[1])
    assert not torch.equal(pairs[3][1], pairs[4][1])
    for image, label in pairs:
        assert image.shape == (3, *data.SIZE)
        assert label.shape == data.SIZE
        # Grey grows with the class, so brightness ranks as classes do wherever scale and jitter put them.
        means = [image[0][label == one].mean().item() for one in range(0, 11, 5) if (label == one).any()]
        assert means == sorted(means)
    padding = [label for image, label in pairs if (image[:, 0, 0].abs() < 0.02).all()]
    assert padding
    assert all(label[0, 0] == data.IGNORE for label in padding)


def test_an_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    (frame,) = data.frames(tiny_camvid(tmp_path), "train")
    one, same, other = (
        torch.cat([images for images, _ in data.training_batches([frame] * 3, batch=2, seed=0, epoch=epoch)])
        for epoch in (0, 0, 1)
    )
    assert one.shape[0] == 3
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(shell.UsageError, match=r"`--data` must be a CamVid folder.*there is no folder"):
        data.frames(tmp_path / "nowhere", "train")
    (tmp_path / "photos").mkdir()
    with pytest.raises(shell.UsageError, match=r"train.txt' is missing \(the folder holds photos\)"):
        data.frames(tmp_path, "train")
    tiny = tiny_camvid(tmp_path)
    (tiny / "trainannot" / "Seq_1.png").unlink()
    with pytest.raises(shell.UsageError, match=r"trainannot/ holds no Seq_1.png"):
        data.frames(tiny, "train")
    with pytest.raises(shell.UsageError, match=r"`--limit` must be at least 1, got 0"):
        data.frames(tiny, "train", 0)


def test_weights_are_checked_by_name_and_shape(tmp_path: Path) -> None:
    vit = common.build_vit(16, (32, 32))
    weights = vit.state_dict()
    np.savez(tmp_path / "ok.npz", **{name: value.numpy() for name, value in weights.items()})
    common.load_backbone(vit, common.read_npz(tmp_path / "ok.npz", argument="--weights"), argument="--weights")
    with pytest.raises(shell.UsageError, match=r"missing \['cls_token'\]"):
        common.load_backbone(vit, {k: v for k, v in weights.items() if k != "cls_token"}, argument="--weights")
    with pytest.raises(shell.UsageError, match=r"'cls_token' must have shape \(1, 1, 192\), got \(1, 2, 192\)"):
        common.load_backbone(vit, weights | {"cls_token": torch.zeros(1, 2, 192)}, argument="--weights")
    with pytest.raises(shell.UsageError, match=r"`--weights` must be an existing .npz file"):
        common.read_npz(tmp_path / "none.npz", argument="--weights")
    np.savez(tmp_path / "pickled.npz", cls_token=np.array([{}], dtype=object))
    with pytest.raises(shell.UsageError, match=r"plain arrays"):
        common.read_npz(tmp_path / "pickled.npz", argument="--weights")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(content: bytes, *, stopped: bool) -> None:
        with shell.replacing(path) as file:
            file.write(content)
            if stopped:
                raise KeyboardInterrupt

    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write(b"half", stopped=True)
    assert path.read_text() == "old"
    write(b"new", stopped=False)
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["result"]


def test_timing_takes_turns_over_the_same_batches() -> None:
    seen: list[str] = []
    batches = [torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    seconds = timing.interleaved({"a": lambda _: seen.append("a"), "b": lambda _: seen.append("b")}, batches, rounds=3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    rounds = ["".join(seen[start : start + 4]) for start in range(2, 14, 4)]
    assert all(one in ("aabb", "bbaa") for one in rounds)


def test_speedup_is_the_median_of_rounds_not_a_ratio_of_medians() -> None:
    figures = timing.summary({"dense": [1.0, 2.0, 8.0], "fast": [0.5, 2.0, 2.0]}, images=4, baseline="dense")
    assert figures["dense"]["images_per_second"][1] == 2.0
    assert figures["fast"]["speedup"][1] == 2.0


@needs_data
@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101), ("test", 233)])
def test_the_real_lists_are_complete(split: str, count: int) -> None:
    frames = data.frames(CAMVID, split)
    assert len(frames) == count
    image, label = data.evaluation_pair(frames[0])
    assert image.shape == (3, *data.SIZE)
    assert image.dtype == torch.float32
    assert set(label.unique().tolist()) <= set(range(12))
    assert [frame.image.stem for frame in data.frames(CAMVID, split, 2)] == [
        frames[0].image.stem, frames[-1].image.stem,
    ]  # fmt: skip


# In float32: bfloat16 takes a processor that does not have it many times as long.
_SHORT = {"epochs": 2, "batch": 2, "limit": 3, "fit_steps": 3, "precision": "fp32"}
RUNS = {
    "from ImageNet": train.Recipe(**_SHORT | {"batch": 1, "limit": 2}),
    # These have epochs whose last batch is smaller.
    **{
        method: dataclasses.replace(train.WITH_EXITS, method=method, **_SHORT)
        for method in (*methods.METHODS, "svit", "svit-discarded", "stvit")
    },
}


def run_train(recipe: train.Recipe, source: Path, out: Path) -> float:
    return train.train(
        recipe, folder=CAMVID, source=source, out=out, device=torch.device("cpu"), workers=0, validate_every=2
    )


@pytest.fixture
def narrow(strips: None) -> Iterator[None]:
    """A narrow network on strips, where it does not matter how well it sees; of the budgets of gates, every second."""
    with of_narrow.in_place_of_tiny(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated, "BUDGETS", (0.8, gated.TRAINED, 0.5))
        yield


@pytest.fixture
def narrow_ready(narrow: None, tmp_path: Path) -> Path:
    return of_narrow.ready(tmp_path / "ready.npz")


@needs_data
@pytest.mark.parametrize("recipe", RUNS.values(), ids=RUNS.keys())
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    recipe: train.Recipe, narrow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = of_narrow.ready if recipe.start == "init" else of_narrow.from_imagenet
    source = weights(tmp_path / "weights.npz")
    straight = run_train(recipe, source, tmp_path / "straight")
    save = train.checkpoints.save

    def save_and_stop(path: Path, content: dict[str, object]) -> None:
        save(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_train(recipe, source, tmp_path / "resumed")
    monkeypatch.undo()
    assert run_train(recipe, source, tmp_path / "resumed") == straight
    files = ["host.safetensors", "exits.json"]
    if recipe.method in gated.VARIANTS:
        files = ["host.safetensors", "head.safetensors", "gates.json"]
        plans = gated.read_plans(tmp_path / "straight")
        assert runs.load_gated(tmp_path / "straight")[0].schedule == plans[gated.TRAINED]
    elif recipe.method in shrunk.VARIANTS:
        files = ["host.safetensors", "head.safetensors", "semantic.json"]
        assert runs.load_semantic(tmp_path / "straight")[0].model.until == shrunk.VARIANTS[recipe.method].until
    elif recipe.start == "init":
        assert runs.load(tmp_path / "straight")[0].schedule == methods.METHODS[recipe.method].saved
    for file in files:  # a plan holds the hash of its weights
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    with pytest.raises(shell.UsageError, match=f"same settings.*batch {recipe.batch}, not 4"):
        run_train(dataclasses.replace(recipe, batch=4), source, tmp_path / "straight")


Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(narrow_ready: Path, kept: Path) -> Trained:
    """Runs of an epoch, each trained when it is first asked for; their exit heads have had the time to become sure."""

    def run(name: str) -> Path:
        if not (kept / name).is_dir():
            run_train(dataclasses.replace(RUNS[name], epochs=1, fit_steps=100), narrow_ready, kept / name)
        return kept / name

    return run


def test_steps_are_taken_in_the_precision_of_the_recipe() -> None:
    seen: dict[str, torch.dtype] = {}
    for precision in ("fp32", "bf16"):
        recipe = train.Recipe(precision=precision)
        vit = common.build_vit(16, (32, 48))
        model = tet.wrap(vit, schedule.dense(after=(4,)), num_classes=len(data.CLASSES), exit_heads=heads.MLP(8))
        optimizer = train.new_optimizer(model, recipe)
        training = train.Training(model, AveragedModel(model), optimizer, train.new_scheduler(optimizer, recipe, 1))
        vit.blocks[0].mlp.fc1.register_forward_hook(
            lambda _layer, _given, out, precision=precision: seen.setdefault(precision, out.dtype) and None
        )
        batch = torch.randn(1, 3, 32, 48), torch.zeros(1, 32, 48, dtype=torch.int64)
        loss = train.run_epoch(training, None, [batch], recipe, first=0, steps=1, device=torch.device("cpu"))
        assert np.isfinite(loss)
    assert seen == {"fp32": torch.float32, "bf16": torch.bfloat16}


@needs_data
def test_without_auxiliary_losses_exit_heads_have_no_part_in_training(strips: None) -> None:
    images, labels = next(iter(data.Batches(data.frames(CAMVID, "train", 2), 2)))
    for auxiliary, taught in ((0.0, False), (0.4, True)):
        recipe = train.Recipe(auxiliary=auxiliary)
        model = train.new_model(DEIT, recipe)
        train.step_loss(model, None, images, labels, recipe, step=0, steps=1).backward()
        assert isinstance(model, tet.ExitingModel)
        assert {one.grad is not None for one in model.exit_heads.parameters()} == {taught}
        assert all(one.grad is not None for one in model.head.parameters())
    for change, words in (({"auxiliary": -1.0}, "from 0 up"), ({"auxiliary": 0.0, "start": "init"}, "positive with")):
        with pytest.raises(shell.UsageError, match=f"`--auxiliary` must be .*{words}"):
            train.Recipe(**change)


@pytest.fixture(scope="module")
def of_a_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder for strips with a wide final head, and other exits for its network."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    size = of_camvid.SIZE
    vit = common.pretrained_vit(DEIT, 16, size)
    model = tet.wrap(vit, schedule.dense(after=(4, 6)), num_classes=len(data.CLASSES), exit_heads=heads.MLP(384))
    config = {"model_name": common.VIT, **common.vit_config(16, size)}
    about = runs.About("timm", config, data.CLASSES, data.PALETTE, data.MEAN, data.STD, size)
    runs.save(folder / "run", model, about)
    plan = common.wide_then_narrow((3, 5))
    tet.save(tet.wrap(vit, plan, head=model.head, exit_heads=heads.Neighbourhood(8)), folder / "exits")
    return folder / "run", folder / "exits"


@needs_data
def test_a_run_folder_is_as_good_a_start_as_a_file(of_a_run: tuple[Path, Path], strips: None) -> None:
    run, _ = of_a_run
    recipe = dataclasses.replace(train.WITH_EXITS, method="neighbours")
    model = train.new_model(run, recipe)
    assert isinstance(model, tet.ExitingModel)
    whole = runs.load(run)[0]
    for found, wanted in ((model.model, whole.model), (model.head, whole.head)):
        assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())
    assert list(model.exit_heads) == ["3", "4", "6", "8", "10"]
    with pytest.raises(
        shell.UsageError, match="`--init` must have a final head as wide as its tokens for svit, 192, got 384"
    ):
        train.new_model(run, dataclasses.replace(recipe, method="svit"))
    (images, labels), *_ = data.Batches(data.frames(CAMVID, "train", 1), 1)
    with torch.no_grad():
        wish, logits = train.scores(model, images), 3 * train.scores(model, images)
    for weight, looks in ((0.0, False), (1.0, True)):
        told = dataclasses.replace(recipe, labels=weight)
        one, other = (train.criterion(label, wish, told)(logits).item() for label in (labels, labels.flip(2)))
        assert (one != other) == looks
        assert one > 0
    with pytest.raises(shell.UsageError, match="`--labels` must be a number from 0 up, and positive without a teacher"):
        train.Recipe(labels=0.0)


@needs_data
def test_exits_that_were_fitted_elsewhere_are_measured(
    of_a_run: tuple[Path, Path], strips: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, exits = of_a_run
    file = tmp_path / "results.json"
    command = [
        "evaluate",
        "--data",
        str(CAMVID),
        "--run",
        str(run),
        "--json",
        str(file),
        "--limit",
        "1",
        "--rounds",
        "0",
    ]
    command += ["--only", "truncated"]
    monkeypatch.setattr(sys, "argv", [*command, "--fitted", str(exits)])
    given = evaluate.arguments()
    model = evaluate.model_of(given, {})
    assert model.head_plan == heads.Neighbourhood(8)
    found = evaluate.evaluate(given)
    assert set(found["settings"]) == {"dense", "truncated after 3", "truncated after 5"}
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(shell.UsageError, match="same inputs.* got .*fitted '"):
        evaluate.evaluate(evaluate.arguments())
    page = ["report", "--data", str(CAMVID), "--json", str(file), "--run", str(run), "--setting", "truncated after 3"]
    monkeypatch.setattr(sys, "argv", [*page, "--out", str(tmp_path / "page.html")])
    with pytest.raises(shell.UsageError, match="`--fitted` must be the exits that the results are of, got None"):
        report.content_of(report.arguments())
    monkeypatch.setattr(sys, "argv", [*command, "--fitted", str(exits), "--fit-after", "4"])
    with pytest.raises(shell.UsageError, match="`--fitted` must be left out with --fit-after"):
        evaluate.arguments()


@needs_data
def test_the_ready_model_is_right_on_whole_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"evaluate --data {CAMVID} --init {READY} --json {tmp_path / 'results.json'} --limit 4 --rounds 0"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--device", "cpu", "--only", "truncated after 8"])
    results = evaluate.evaluate(evaluate.arguments())
    dense, cut = (results["settings"][name] for name in ("dense", "truncated after 8"))
    assert dense["miou"] > 0.55
    assert dense["token_blocks"] == 1.0
    assert dense["agreement"] == 1.0
    assert set(dense["iou"]) == set(data.CLASSES)
    assert cut["token_blocks"] == pytest.approx(8 / 12)
    assert 0.9 < cut["agreement"] < 1
    assert cut["multiply_adds"] < dense["multiply_adds"]


@needs_data
def test_the_ready_model_is_measured_once(
    ready_for_strips: Path, strips: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"evaluate --data {CAMVID} --init {ready_for_strips} --json {tmp_path / 'results.json'} --limit 2".split()
    command += ["--rounds", "1", "--batches", "1", "--timing-images", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    results = evaluate.evaluate(evaluate.arguments())
    assert {"dense", "truncated after 8"} < set(results["settings"])
    assert set(results["timing"]["1"]["settings"]) == set(results["settings"])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert len(report.table(results).splitlines()) == 1 + len(results["settings"])
    report.plot(results, tmp_path / "frontier.png")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluate, "accuracy", never)
    monkeypatch.setattr(evaluate, "timed", never)
    assert evaluate.evaluate(evaluate.arguments())["settings"] == results["settings"]
    monkeypatch.setattr(sys, "argv", [*command, "--split", "test"])
    with pytest.raises(shell.UsageError, match=r"same inputs.*split 'val', not 'test'"):
        evaluate.evaluate(evaluate.arguments())


@needs_data
def test_a_search_that_is_stopped_goes_on_and_its_best_can_be_measured(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("dense")

    def searched(name: str, evaluations: int) -> dict[str, Any]:
        command = f"search --data {CAMVID} --run {run} --json {tmp_path / name} --limit 2 --drop 100"
        command += f" --evaluations {evaluations} --exact 2"
        monkeypatch.setattr(sys, "argv", command.split())
        search.main()
        return json.loads((tmp_path / name).read_text())

    whole = searched("straight.json", 20)
    searched("resumed.json", 11)
    assert searched("resumed.json", 20)["found"] == whole["found"]
    assert len(whole["found"]) == 20
    assert len(whole["exact"]) == 2
    truncated = [one for one in whole["found"] if len(one["schedule"]["exits"]) == 1]
    assert {one["schedule"]["exits"][0]["after"] for one in truncated} >= {3, 4, 6, 8, 10}
    setting = evaluate.read_plan(tmp_path / "straight_best.json")
    costs = {json.dumps(one["schedule"]): one["cost"] for one in whole["exact"]}
    assert costs[json.dumps(setting.plan.to_dict())] == min(costs.values())
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--drop", "-50"])
    with pytest.raises(shell.UsageError, match="`--drop` must be at least .* which the best loses, got -50"):
        search.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "1"])
    with pytest.raises(shell.UsageError, match="`--json` must be a new file or have results of the same search"):
        search.main()


@needs_data
def test_a_search_with_merges_runs_its_plans_and_can_go_by_the_clock(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Latency(1, (1, 1000), (0.001, 1.0), rest=0.0, exit=0.0, merge=0.0)
    monkeypatch.setattr(tet, "measure_latency", lambda *_, **__: table)
    command = f"search --data {CAMVID} --run {trained('dense')} --json {tmp_path / 'found.json'} --limit 1 --drop 100"
    command += " --exits 3 --merge-after 1 --evaluations 13 --exact 3 --cost seconds"
    monkeypatch.setattr(sys, "argv", command.split())
    search.main()
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["latency"] == table.to_dict()
    assert len(results["found"]) == 13
    merging = [Schedule.from_dict(one["schedule"]) for one in results["found"] if "merges" in one["schedule"]]
    assert search.described(merging[0]) == "merge after 1 up to 2: alike > 0.93"
    assert [one["replayed"] for one in results["exact"]] == [[one["quality"], one["cost"]] for one in results["exact"]]
    slow = dataclasses.replace(table, merge=1e3, exit=1e3, block=(0.0, 0.0), rest=1.0)  # nothing saves
    monkeypatch.setattr(tet, "measure_latency", lambda *_, **__: slow)
    monkeypatch.setattr(sys, "argv", [*command.split(), "--json", str(tmp_path / "slow.json")])
    search.main()
    assert capsys.readouterr().out.endswith("None of them is cheaper than dense.\n")
    monkeypatch.setattr(sys, "argv", [*command.split(), "--cell", "3"])
    with pytest.raises(shell.UsageError, match="`--cell` must be 0 with --merge-after, got 3"):
        search.main()
    monkeypatch.setattr(sys, "argv", [*command.split(), "--exits", "5"])
    with pytest.raises(shell.UsageError, match=r"`--exits` must be among the blocks with an exit head, .* got \[5\]"):
        search.main()


def test_the_best_of_each_band_of_cost_is_run() -> None:
    costs = {0.2: 0.5, 0.3: 0.6, 0.35: 0.7, 0.7: 0.69, 0.75: 0.71, 0.99: 0.7, 1.0: 0.9}
    found = [Found(schedule.truncated(after=3), quality, cost) for cost, quality in costs.items()]
    assert [one.cost for one in search.best_of_bands(found, 4)] == [0.35, 0.75, 0.99]
    assert search.best_of_bands(found[-1:], 4) == []


@needs_data
@pytest.mark.parametrize("name", ["svit", "svit-fixed", "svit-keys"])
def test_budgets_of_gates_are_kept_on_the_images_that_they_are_calibrated_on(
    name: str, ready_for_strips: Path, strips: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = (0.5, 0.8)
    monkeypatch.setattr(gated, "BUDGETS", budgets)
    variant = gated.VARIANTS[name]
    vit, final, _ = common.ready_model(ready_for_strips, data.SIZE)
    model = gated.new_model(vit, final, variant).eval()
    for gate in model.gates.values():
        with torch.no_grad():
            gate.get_parameter("3.weight").mul_(20)
    frames = data.frames(CAMVID, "train", 4)
    plans = gated.budget_plans(model, variant, frames, torch.device("cpu"))
    images = torch.cat(list(data.Images(data.Batches(frames, 4), torch.device("cpu"))))
    with torch.inference_mode():
        dense = model.multiply_adds(model(images, schedule=schedule.dense())).sum()
        for budget in budgets:
            sparse = model.multiply_adds(model(images, schedule=plans[budget])).sum() / dense
            # Attention is quadratic in tokens, so that images that differ cost more than their mean rate says.
            assert -0.002 <= sparse - budget <= 0.03


@needs_data
@pytest.mark.parametrize("name", gated.VARIANTS)
def test_every_variant_of_gates_learns(name: str, ready_for_strips: Path, strips: None) -> None:
    variant = gated.VARIANTS[name]
    model = gated.new_model(*common.ready_model(ready_for_strips, data.SIZE)[:2], variant)
    images, labels = next(iter(data.Batches(data.frames(CAMVID, "train", 1), 1)))
    step = functools.partial(gated.loss, model, images, variant=variant, seed=1)
    losses = [step(train.criterion(labels, None, train.WITH_EXITS), step=at) for at in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert {int(after) for after in model.gates} == set(variant.rate)
    for gate in model.gates.values():
        assert all(one.grad is not None and one.grad.isfinite().all() for one in gate.parameters())
        assert any(one.grad is not None and one.grad.any() for one in gate.parameters())


@needs_data
def test_insights_are_measured_once(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insights, "_TUNING_IMAGES", 8)
    gates, exiting = (trained(name) for name in ("svit", "dtop"))
    given = argparse.Namespace(
        data=CAMVID, runs=[gates, exiting], json=tmp_path / "found.json", plot=None, split="val",
        budget=0.65, limit=4, batch=2, threads=None, device="cpu",
    )  # fmt: skip
    results = insights.run(given)
    assert insights.table(results).count("\n") == 3
    svit = results["runs"][str(gates)]
    assert [len(point["rates"]) for point in svit["points"]] == [4] * len(svit["points"])
    work = [point["multiply_adds"] for point in svit["points"]]
    assert work == sorted(work)
    assert min(point["miou"] for point in svit["points"]) <= svit["miou"] <= max(p["miou"] for p in svit["points"])
    (exits,) = results["runs"][str(exiting)]["points"]
    assert 0.3 < exits["multiply_adds"] < 1
    assert [row["after"] for row in results["calibration"]] == list(gated.VARIANTS["svit"].after)
    for row in results["calibration"]:
        assert abs(row["calibrated"] - row["rate"]) < 0.01
    assert -1 <= results["difficulty"]["correlation"] <= 1
    insights.plot(results, tmp_path / "rates.png")

    def measured_again(*_args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(insights, "measure", measured_again)
    assert insights.run(given) == results
    given.budget = 0.5
    with pytest.raises(shell.UsageError, match=r"`--json` must hold results of"):
        insights.run(given)


@needs_data
def test_networks_are_compared_once(
    trained: Trained, narrow_ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [trained(name) for name in ("stvit", "svit", "dtop")]
    given = argparse.Namespace(
        data=CAMVID, init=narrow_ready, runs=folders, json=tmp_path / "found.json", only=None, split="val", limit=2,
        batches=[2], rounds=1, timing_images=2, accuracy_batch=2, threads=None, device="cpu",
    )  # fmt: skip
    results = compare.compare(given)
    settings = results["settings"]
    exits = [f"dtop: dtop, {way}" for way in ("dense", *(f"cut short after {after}" for after in (4, 6, 8)), "exits")]
    gates = [f"svit: svit, {way}" for way in ("dense", *(f"gates {budget:.2f}" for budget in sorted(gated.BUDGETS)))]
    assert [*settings] == [compare.BASELINE, "stvit: stvit", *gates, *exits]
    whole = settings[compare.BASELINE]["multiply_adds"]
    # 48 semantic tokens for the 120 patches of a strip; what it is for a frame is looked at below.
    assert settings["stvit: stvit"]["multiply_adds"] / whole == pytest.approx(0.709, abs=1e-3)
    assert settings["dtop: dtop, cut short after 6"]["multiply_adds"] / whole == pytest.approx(0.539, abs=5e-3)
    assert settings["dtop: dtop, dense"]["multiply_adds"] == pytest.approx(whole, rel=1e-6)
    assert all(0 < one["miou"] < 1 for one in settings.values())
    assert [*results["timing"]["2"]["settings"]] == [*settings]
    rows = compare.table(results).splitlines()
    assert len(rows) == 2 + len(settings)
    assert all(row.count("|") == 7 for row in rows)

    def measured_again(*_args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(compare, "accuracy", measured_again)
    monkeypatch.setattr(compare.timing, "interleaved", measured_again)
    assert compare.compare(given) == results
    given.only = ["stvit", "after 4"]
    given.rounds = 0
    assert compare.compare(given) == results
    given.limit = 1
    with pytest.raises(shell.UsageError, match=r"`--json` must hold results of"):
        compare.compare(given)


@needs_data
@torch.inference_mode()
def test_the_work_of_networks_that_are_compared_is_that_of_whole_frames() -> None:
    vit, final, exit_heads = common.ready_model(READY, data.SIZE)
    exiting = tet.wrap(vit, schedule.dense(after=(6,)), head=final, exit_heads={6: exit_heads[6]}).eval()
    segmenter = shrunk.new_model(vit, final, shrunk.VARIANTS["stvit"]).eval()
    image = torch.zeros(1, 3, *data.SIZE)
    whole, cut = (compare._scores(exiting, plan, image)[1] for plan in (schedule.dense(), schedule.truncated(after=6)))
    assert (compare._recovered(segmenter, image)[1] / whole).item() == pytest.approx(0.521, abs=1e-3)
    assert (cut / whole).item() == pytest.approx(0.51, abs=5e-3)


def test_ranks_correlate() -> None:
    assert insights.correlation([1, 2, 30], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert insights.correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert insights.between(
        [{"multiply_adds": 0.6, "miou": 0.5}, {"multiply_adds": 0.7, "miou": 0.7}], 0.65
    ) == pytest.approx(0.6)
