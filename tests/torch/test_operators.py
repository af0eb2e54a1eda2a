"""What an exit costs before anything is computed: operators in eager PyTorch, kernels of its compiled decision."""

import itertools
import subprocess
import sys

from tests.benchmarks import operators


def test_an_exit_dispatches_few_operators():
    found = operators.counts(size=(128, 192))
    for rule, most in (("neighbours", 46), ("dtop", 40)):
        count, shares = found[rule]
        assert 20 < count <= most, rule
        assert all(0 < later < earlier for earlier, later in itertools.pairwise((1, *shares))), rule


def test_several_images_cost_some_more():
    for rule, (count, _) in operators.counts(4, size=(128, 192)).items():
        assert count <= 70, rule


def test_a_decision_is_one_program_of_few_kernels():
    """By itself, for what the tests check of every call does not compile."""
    code = "from tests.benchmarks import operators; print(operators.kernels('neighbours'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert 3 <= int(found.stdout) <= 8
