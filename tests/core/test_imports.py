"""The core knows no framework: proved in a process of its own, by a check that is itself shown to fail."""

import subprocess
import sys

import pytest

USE = """
import numpy as np
import tokenexit
from tokenexit import adapting, carries, cost, folders, heads, ledger, manifest, policies
from tokenexit import prediction, retention, schedule, scores, sealed, semantic, surroundings, tokens, training, weights
from tokenexit.windows import Windows, blended, crops
from tokenexit.guarantees import calibrate, calibration, certificate, drift, ladders, risks
logits, mask = np.ones((6, 3), np.float32), np.ones((2, 3), bool)
packing = tokens.pack(mask)
evidence = policies.Evidence(
    logits, gate=logits[:, 0], image=packing.image, images=2, grid=(1, 3), position=packing.slot,
    protected=~mask[packing.image, packing.slot], previous=np.zeros((1, 6), int)
)
plans = [schedule.neighbours(threshold=0.1), schedule.dtop(), schedule.dovit(), schedule.paumer(), schedule.svit()]
for plan in [*plans, schedule.paumer(keep={3: 0.5}), schedule.dense(after=(1,)), schedule.truncated(after=2)]:
    for one in plan.exits:
        leave = one.policy(evidence)
        static = policies.Evidence(logits, gate=logits[:, 0], image=packing.image, images=2, grid=(1, 3),
                                   position=packing.slot, valid=mask.reshape(6))
        one.policy(static)
    assert schedule.Schedule.from_dict(plan.to_dict()) == plan
own = policies.PerClass((0.1, 0.2, 0.3))
(policies.EntropyBelow(0.5) | ~policies.MarginAbove(own) & policies.Patience())(evidence)
(policies.Budget(1, by="gate") & policies.BatchBudget(0.5)).with_minimum(per_image=1)(evidence)
presence = np.ones(3, np.float32)
table = scores.mask_scores(logits, presence)
policies.ConfidenceAbove(0.2).retaining(per_class=1)(policies.Evidence(class_scores=table))
many = np.ones(3000, np.float32)
retention.top_k_per_group(many > 0, many, many.astype(int), k=2, groups=2)
retention.top_k_per_group(*(x.reshape(2, 1500) for x in (many > 0, many, many.astype(int))), k=2, groups=2)
retention.rank_in_group(many, many.astype(int))
book = ledger.record(ledger.open_ledger(logits, packing, features=logits), packing, leave, logits, depth=3,
                     features=logits)
folded = ledger.fold_leavers(logits, packing, leave)
ledger.rejoin(book, packing, folded)
tokens.scatter(tokens.gather(book.logits, packing), packing, into=book.logits)
tokens.repack(packing, leave)
surroundings.beside_running(logits, packing, grid=(1, 3), radius=1)
selection, _ = tokens.select(mask, mask.astype(np.float32), capacity=2)
selection, _, _ = tokens.reselect(selection, selection.valid, selection.valid.astype(np.float32), capacity=1)
entries = tokens.gather(book.features, selection)
tokens.scatter(entries, selection, into=book.features)
ledger.rejoin(book, selection, ledger.fold_leavers(entries, selection, selection.valid))
ledger.record(book, selection, selection.valid, tokens.gather(book.logits, selection), depth=4, features=entries)
head = cost.of_head(heads.MLP(), width=8, classes=3)
price = cost.plain_vit(width=8, depth=12, patch=2, exit_heads={6: head}, head=cost.atm_head(width=8, classes=3))
blocks = np.full((2, 12), 3)
price.multiply_adds(blocks, patches=3, exits=(6,))
price.repacking(blocks[:, 5], 1, after=6, per_moved_element=0.5).batch_pays
cost.token_blocks(blocks, slots=3)
plan = manifest.HeadManifest(schedule.dovit(), (2, 5, 8), heads.MLP(), True, 3, 8, 12)
assert manifest.from_dict(manifest.to_dict(plan), "exits") == plan
specs = manifest.head_specs(plan, "exits", lambda _: {"0.bias": weights.Spec((3,), "float32")})
weights.require_specs("folder", manifest.weights_rule("exits"), specs, specs)
assert adapting.is_whole(3)
assert sealed.unseal(sealed.seal(manifest.to_dict(plan))) == manifest.to_dict(plan)
assert carries.from_dict(carries.to_dict(carries.Feature())) == carries.Feature()
windows = semantic.stvit_r().windows(9, 14)
pooled, _ = semantic.pool(np.ones((1, 9, 14, 2), np.float32), windows, to=(3, 3))
semantic.neighbourhoods(semantic.join(pooled, windows.pooled((3, 3))), windows.pooled((3, 3)), size=(9, 9))
cut = Windows((4, 4), (2, 2), blend="linear")
seen = np.concatenate(list(crops(np.ones((2, 3, 5, 9), np.float32), cut)))
blended(seen, cut, size=(5, 9), upsample=lambda some: some)
class Toy(prediction.Predictor):
    weights = {np.ndarray: "an array"}
    def placed(self, built, /): return plan
    def fingerprints(self, model, /, *, resolution, preprocessing): return None
    def image_shape(self, model, /): return (3, 4, 4)
    def segment(self, model, pictures, /): return prediction.Segmented(pictures, pictures[:, 0], pictures[:, 0, 0], None)
    def upsample(self, scores, size, area, /): return scores
Toy(int, mean=(0,) * 3, std=(1,) * 3)({"image": np.ones((2, 3, 4, 4), np.float32)})["label"]
labels = np.asarray([[0, 1, 1], [1, 1, 1]])
risks.disagreement(labels, labels[::-1]), risks.error_increase(labels, labels, labels[::-1], classes=2)
risks.iou_loss(labels, labels[::-1], classes=2, at_least=0.5)
ladder = ladders.by_threshold(schedule.neighbours(), thresholds=(0.9, 0.8))
ladders.per_class(labels[0], logits[:3, 0], labels[0] > 0, classes=2, level=0.5, thresholds=(0.5,), least=1)
for test in ("betting", "hoeffding-bentkus"):
    report = calibration.certify(ladder, np.zeros((200, 2)), (0.9, 0.8), at_most=0.05, test=test)
calibration.certify_in_turn(ladder, lambda one: (np.zeros(200), 0.9), images=200, at_most=0.05)
calibration.conformal(np.zeros((200, 2)), at_most=0.05)
prints = certificate.Fingerprints({"a": "0" * 64}, "float32", (8, 8), "none", "numpy")
paper = certificate.from_json(certificate.to_json(report.certificate(prints)))
certificate.require_matches(paper, prints)
seen = drift.sample(np.ones((2, 3, 4), np.float32), np.ones((2, 4), int), after=(1,))
str(drift.compare(seen, seen)), str(report), str(paper)
training.Annealed(1.0, 0.9, steps=2).at(1)
pictures = np.random.default_rng(0).normal(size=(40, 3, 2, 2))
digests = tuple(certificate.digest(one.tobytes(), dtype="float64", shape=one.shape) for one in pictures)
def run(images, plan, /, *, size):
    count = len(images)
    return calibrate.Outcome(images.argmax(1), images, np.full((count, 2, 2), 3), np.full(count, 9), np.full((count, 3), 4))
model = calibrate.AdaptedModel(
    run=run, look=lambda batch: ((2, 2), digests), check=lambda plan: None,
    settings=lambda: calibrate.default_settings(schedule.neighbours(), after=(1,)),
    fingerprints=lambda size: prints, store=None, classes=3,
)
str(calibrate.calibrate(model, [pictures], level=calibrate.Level(0.3)))
"""
CHECK = """
import sys
loaded = {"torch", "jax", "jaxlib", "tensorflow", "cupy", "einops", "scipy", "matplotlib"} & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_core_loads_no_framework():
    done = run("import tokenexit" + CHECK)
    assert done.returncode == 0, done.stderr


def test_importing_the_core_needs_no_numpy():
    done = run("import sys\nsys.modules['numpy'] = None\nimport tokenexit")
    assert done.returncode == 0, done.stderr


def test_the_core_on_numpy_loads_no_framework():
    done = run(USE + CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_that_test_can_fail(framework):
    """Also if the framework is loaded by nothing but a function that is used."""
    pytest.importorskip(framework)
    late = f"""
from tokenexit import _array
def first_k(value, k):
    import {framework}
_array.first_k = first_k
_array.first_k(None, 1)
"""
    done = run("import tokenexit" + late + CHECK)
    assert done.returncode == 1
    assert f"'{framework}'" in done.stderr
