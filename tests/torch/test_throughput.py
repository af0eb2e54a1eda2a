"""The benchmark of throughput, on a network and images that are small: what it says of what it runs."""

import json

import pytest

from tests.benchmarks import throughput
from tests.torch import models

ARGUMENTS = [
    "--host", "vit_tiny_patch16_224", "--size", "64", "--batch", "3", "--rounds", "2", "--at-least", "0.001",
]  # fmt: skip


@pytest.fixture(autouse=True)
def timm():
    models.import_timm()


def test_it_times_the_same_token_blocks_in_every_way(tmp_path, capsys):
    throughput.main([*ARGUMENTS, "--keep", "1.0,0.5", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    table = capsys.readouterr().out
    assert found["settings"]["host"] == "vit_tiny_patch16_224"
    assert {"torch", "threads", "timm"} <= set(found["machine"])
    rows = {(row["contender"], row["keep"]): row for row in found["rows"]}
    assert set(rows) == {("dense", 1.0)} | {
        (name, keep) for name in ("limit", "packed", "static", "short") for keep in (1.0, 0.5)
    }
    for (name, keep), row in rows.items():
        assert row["ms"] == sorted(row["ms"])
        assert f"| {name} |" in table
        if name != "dense":
            assert row["token_blocks"] == pytest.approx(keep, abs=0.03)  # of 16 patches
            assert len(row["of_limit"]) == 3


@pytest.mark.parametrize("keep", ["0.2", "1.1", "0.5,0.1"])
def test_shares_that_no_exit_could_make_are_refused(keep, capsys):
    with pytest.raises(SystemExit):
        throughput.main([*ARGUMENTS, "--keep", keep])
    assert "more than 0.25" in capsys.readouterr().err
