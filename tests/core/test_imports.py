"""The core knows no framework: proved in a process of its own, by a check that is itself shown to fail."""

import subprocess
import sys

import pytest

USE = """
import numpy as np
import tokenexit
from tokenexit import cost, heads, ledger, manifest, policies, retention, schedule, scores, tokens
logits, mask = np.ones((6, 3), np.float32), np.ones((2, 3), bool)
packing = tokens.pack(mask)
evidence = policies.Evidence(
    logits, image=packing.image, images=2, grid=(1, 3), position=packing.slot, protected=~mask[packing.image, packing.slot]
)
for one in schedule.neighbours(threshold=0.1).exits + schedule.dtop().exits:
    leave = one.policy(evidence)
(policies.EntropyBelow(0.5) | policies.MarginAbove(0.5) & policies.never())(evidence)
book = ledger.record(ledger.open_ledger(logits, packing), packing, leave, logits, depth=3)
tokens.scatter(tokens.gather(book.logits, packing), packing, into=book.logits)
tokens.repack(packing, leave)
plan = manifest.Manifest(schedule.dtop(), (6, 8), heads.MLP(), True, 3, 8, 12)
assert manifest.from_json(manifest.to_json(plan)) == plan
"""
CHECK = """
import sys
loaded = {"torch", "jax", "tensorflow", "cupy"} & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_core_on_numpy_loads_no_framework():
    done = run(USE + CHECK)
    assert done.returncode == 0, done.stderr


def test_that_test_can_fail():
    pytest.importorskip("torch")
    done = run("import torch" + USE + CHECK)
    assert done.returncode == 1
    assert "torch" in done.stderr
