"""What a call has done, in words and in pictures."""

import pytest
import torch
from torch import nn

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import TokenExitError, schedule
from tokenexit.policies import ConfidenceAbove
from tokenexit.schedule import Exit, Schedule


class Depths(nn.Module):
    def forward(self, maps):
        return maps.mean(dim=1)


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


@torch.inference_mode()
def test_an_output_reads_as_a_sentence_and_shows_what_came_out(tmp_path):
    images = models.images(2)
    model = models.wrapped(models.timm_vit, Schedule((Exit(2, ConfidenceAbove(0.5)),)))
    out = model(images)
    left = (out.exit_depth == 2).float().mean().item()
    assert f"{100 * left:.1f} % after block 2" in out.summary()
    assert repr(out) == f"<Output: {out.summary()}>"
    figure = tet.show(images[1], out, tmp_path / "one.png", index=1)
    assert titles(figure) == ["image", "blocks that patches ran through", "classes"]
    assert (tmp_path / "one.png").exists()
    assert titles(tet.show(images[0, :1], out, index=0))[-1] == "classes"
    for decoder, title in ((nn.Conv2d(48, 3, 1), "classes"), (nn.Conv2d(48, 1, 1), "output"), (Depths(), "output")):
        merging = tet.wrap(models.timm_vit(), schedule.merged(alike={1: 0.9}), decoder=decoder).eval()
        decoded = merging(images)
        assert "ran merged" in repr(decoded)
        assert titles(tet.show(images[0], decoded, index=0))[2:] == ["patches in a token", title]
    assert titles(tet.show(images[0], decoded._replace(decoded={"a": 1}), index=0))[2:] == ["patches in a token"]


@pytest.mark.usefixtures("unchecked")
@torch.inference_mode()
def test_what_cannot_be_shown_is_refused():
    images = models.images(2)
    out = models.wrapped(models.timm_vit, schedule.dense())(images)
    for message, given in (
        ("`index` must be from 0 to 1, the place of the image in the batch, got 2", {"index": 2}),
        ("`index` must be from 0 to 1, the place of the image in the batch, got None", {"index": None}),
        ("`photo` must be the image that was run, of 4 x 6 patches, got 30 x 48 pixels", {"image": images[0, :, :30]}),
        (r"`image` must be of shape \(3, height, width\), or with one channel, got shape", {"image": images}),
        ("`output` must be what a model from `wrap` or `wrap_decoder` returns, got Tensor", {"output": images}),
    ):
        whole = {"image": images[0], "output": out, "index": 0} | given
        with pytest.raises(TokenExitError, match=message):
            tet.show(whole["image"], whole["output"], index=whole["index"])
