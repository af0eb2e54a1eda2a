"""The ablations and the oracle on CamVid: their parts on made-up traces, the whole on real frames."""

import json
import sys
from pathlib import Path

import pytest
import torch

import tokenexit_torch as tet
from examples import shell
from examples.camvid import ablations, evaluate, oracle
from tests.examples.strips import CAMVID, needs_data
from tests.torch import models
from tokenexit import schedule
from tokenexit.policies import NeighboursAgree, PerClass


def made_up(images: int = 3, heads: int = 4, classes: int = 3, *, seed: int = 0) -> tet.Trace:
    """Heads that come ever nearer to what the last one says."""
    generator = torch.Generator().manual_seed(seed)
    final, noise = (torch.randn(images, heads, classes, 6, 8, generator=generator) for _ in range(2))
    share = torch.linspace(1, 0, heads)[:, None, None, None]
    return tet.Trace(3 * (final[:, -1:] + share * noise), tuple(range(1, heads + 1)), 0)


def material(trace: tet.Trace) -> ablations.Material:
    return ablations.Material(trace.after[:-1], lambda: trace, lambda: trace, 0.7)


def test_a_threshold_is_found_for_the_work() -> None:
    trace = made_up()
    found = ablations.matched(lambda x: schedule.dtop(after=(1, 2), threshold=x, per_class=0), 0.7, trace)
    assert ablations.token_blocks(trace, found) == pytest.approx(0.7, abs=0.01)


def test_rows_change_one_thing_alone(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "_PUBLISHED", (1, 2, 3))
    monkeypatch.setattr(ablations, "_NUMBERS", ((3,), (2, 3), (1, 2, 3), (1, 2, 3, 9)))
    made = material(made_up())
    rows = {group: make(made) for group, make in ablations.GROUPS.items()}
    assert [len(row.plan.exits) for row in rows["exits"]] == [1, 2, 3]  # a block without a head is left out, once
    assert [row.plan.after for row in rows["blocks"]] == [(1,), (2,), (3,)]
    assert len({row.plan for row in rows["k"]}) == 4
    inner = [
        [getattr(exit.policy, "policy", exit.policy) for exit in row.plan.exits]
        for row in (*rows["radius"], *rows["thresholds"][2:])
    ]
    assert all(isinstance(policy, NeighboursAgree) for policies in inner for policy in policies)
    assert [tuple(policy.radius for policy in policies) for policies in inner[:7]] == [*ablations._RADII.values()]
    names = [row.name for group in rows.values() for row in group]
    assert len(names) == len(set(names))


def test_a_class_threshold_is_the_least_that_is_good_enough() -> None:
    trace = made_up(8)
    for after, found in ablations.class_thresholds(trace, (1, 2), 0.8).items():
        assert isinstance(found, PerClass)
        top, label = trace.logits[:, after - 1].softmax(1).max(1)
        agrees = label == trace.logits[:, -1].argmax(1)
        for one, threshold in enumerate(found.thresholds):
            mine = label == one
            above = agrees[mine & (top > threshold)].double()
            assert above.mean() >= 0.8
            more = top[mine & (top <= threshold)].sort(descending=True).values
            lower = [agrees[mine & (top >= bound)].double().mean().item() for bound in more]
            assert all(share < 0.8 for share in lower)


def test_a_class_that_no_threshold_makes_good_enough_stays() -> None:
    trace = made_up()
    wrong = tet.Trace(torch.cat([-trace.logits[:, -1:], trace.logits[:, -1:]], dim=1), (1, 2), 0)
    assert ablations.class_thresholds(wrong, (1,), 0.5)[1].thresholds == (1.0,) * 3


def test_the_oracle_leaves_where_the_label_is_final() -> None:
    model = models.wrapped(models.timm_vit, schedule.dense())
    images = models.images(3)
    heads = model.every_exit(images)
    after = tuple(heads)[:-1]
    final = heads[model.depth].argmax(1)
    out = model(images, schedule=oracle.knowing(final.flatten(1), after))
    first = heads[after[0]].argmax(1) == final
    assert 0 < first.double().mean() < 1
    assert torch.equal(out.exit_depth == after[0], first)


def test_lines_lead_to_the_final_logits() -> None:
    trace = made_up()
    bent = tet.Trace(torch.cat([2 * trace.logits[:, -1:] - 1, trace.logits[:, -1:]], dim=1), (1, 2), 0)
    slope, level = oracle.lines(bent, (1,))
    torch.testing.assert_close(slope, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(level, torch.tensor([[0.5] * 3, [0.0] * 3]), rtol=0, atol=1e-5)
    logits = bent.logits.transpose(0, 1)
    seen = oracle.Seen(logits, torch.zeros(3, 6, 8, dtype=torch.int64), slope, level)
    torch.testing.assert_close(oracle.FROZEN["logits on a line to the final ones"](seen), logits[-1])
    torch.testing.assert_close(oracle.FROZEN["its logits"](seen), logits[0])


@needs_data
def test_ablations_go_on_and_keep_to_their_inputs(
    ready_for_strips: Path, strips: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"ablations --data {CAMVID} --init {ready_for_strips} --json {tmp_path / 'a.json'} --device cpu"
    command += " --limit 2 --train-limit 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--only", "k"])
    some = ablations.ablate(ablations.arguments())["settings"]
    monkeypatch.setattr(sys, "argv", [*command.split(), "--only", "k", "score"])
    monkeypatch.setattr(evaluate, "accuracy", _counted(evaluate.accuracy, counted := []))
    results = ablations.ablate(ablations.arguments())
    assert len(counted) == 1 + 3  # dense, with which the others are compared, and what was not there
    assert {name: results["settings"][name]["miou"] for name in some} == {name: some[name]["miou"] for name in some}
    assert json.loads((tmp_path / "a.json").read_text()) == results
    kept = [entry["token_blocks"] for name, entry in results["settings"].items() if name.startswith("k =")]
    assert kept == sorted(kept)
    scored = [entry["token_blocks"] for entry in results["settings"].values() if entry["kind"] == "score"]
    assert scored == pytest.approx([0.6] * 3, abs=0.03)
    monkeypatch.setattr(sys, "argv", [*command.split(), "--work", "1.5"])
    with pytest.raises(shell.UsageError, match=r"`--work` must be in \(0, 1\), got 1.5"):
        ablations.arguments()


def _counted(function, calls):
    def counting(*given, **options):
        calls.append(options)
        return function(*given, **options)

    return counting


@needs_data
def test_the_oracle_is_run_and_replayed(
    ready_for_strips: Path, strips: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"oracle --data {CAMVID} --init {ready_for_strips} --exits 6 8 --limit 2 --train-limit 2 --device cpu"
    monkeypatch.setattr(sys, "argv", command.split())
    oracle.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(oracle.FROZEN)
    miou = {line.split("  ")[0]: float(line.split("mIoU ")[1].split()[0]) for line in lines}
    work = {line.split("  ")[0]: float(line.split()[-1]) for line in lines}
    assert work["dense"] == 1.0
    assert work["really run"] < 0.6
    assert miou["dense"] > miou["replayed, a leaver leaves its logits"] > miou["replayed, a leaver leaves its label"]
    monkeypatch.setattr(sys, "argv", [*command.split(), "--exits", "5"])
    with pytest.raises(shell.UsageError, match="`--exits` must be among the blocks with a head"):
        oracle.main()
