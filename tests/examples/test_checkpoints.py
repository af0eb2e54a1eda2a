import pickle

import pytest
import torch

from examples import checkpoints, shell


def test_what_was_saved_comes_back(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    content = {
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "recipe": {"size": (2, 3), "rate": 0.5, "name": "x", "none": None, "flag": True, 7: [1, 2.5]},
    }
    checkpoints.save(tmp_path / "c", content)
    found = checkpoints.load(tmp_path / "c")
    assert found["recipe"] == content["recipe"]
    assert torch.equal(found["random"], content["random"])
    for key, value in content["optimizer"]["state"][0].items():
        assert torch.equal(found["optimizer"]["state"][0][key], value)
    assert found["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]


def test_what_is_no_checkpoint_is_a_clear_error_and_never_executed(tmp_path):
    file = tmp_path / "c"
    for content in (b"", pickle.dumps({"a": 1}), b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(shell.UsageError, match="`--out` must hold a checkpoint"):
            checkpoints.load(file)
    with pytest.raises(TypeError, match="got function"):
        checkpoints.save(file, {"code": lambda: 0})
