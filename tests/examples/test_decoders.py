"""Dense decoders on frozen features: how they are trained, and what is measured under them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokenexit_torch as tet
from examples import merging, shell
from examples.camvid import data, decoders, decoding, evaluate, leaving, translators, under_decoders
from examples.timm_import import import_timm
from tests.examples import narrow as of_narrow
from tests.examples.strips import CAMVID, needs_data
from tokenexit import schedule
from tokenexit.schedule import Merge, Schedule

SIZE, PATCH, WIDTH = (32, 64), 8, 24
TAPS = (1, 2, 3, 4)
KINDS = {name: TAPS[-len(kind.taps) :] for name, kind in decoding.DECODERS.items()}


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    made = import_timm().models.VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=4, num_heads=3, num_classes=0, final_norm=False
    )
    with torch.no_grad():  # weights as drawn are so small that all tokens are alike
        for block in made.blocks:
            block.attn.qkv.weight.mul_(10)
    return made.eval()


def under(vit: nn.Module, name: str) -> tet.DecodingModel:
    torch.manual_seed(1)
    decoder = decoding.new_decoders(vit)[name].eval()
    return tet.wrap(vit, schedule.dense(), decoder=decoder, taps=KINDS[name])


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("patch", [4, 8, 16, 32])
@pytest.mark.parametrize("name", KINDS)
def test_scores_are_at_a_quarter_of_the_sides_whatever_the_patches(name: str, patch: int) -> None:
    grid = 64 // patch, 96 // patch
    maps = [torch.randn(2, WIDTH, *grid) for _ in KINDS[name]]
    decoder = decoding.DECODERS[name].build(WIDTH, patch, 5).eval()
    assert decoder(decoding.given(maps)).shape == (2, 5, 16, 24)
    odd = [map[:, :, : grid[0] - 1, :] for map in maps] if grid[0] > 2 else maps  # as a smaller image may have it
    assert decoder(decoding.given(odd)).shape[:2] == (2, 5)


@torch.inference_mode()
@pytest.mark.parametrize("name", KINDS)
def test_every_map_is_read_and_normed(name: str, vit: nn.Module, images: Tensor) -> None:
    decoder = under(vit, name).model.get_submodule("decoder")
    maps = decoding.maps_of(vit, images, KINDS[name])
    scores = decoder(decoding.given(maps))
    torch.testing.assert_close(decoder(decoding.given([3 * map for map in maps])), scores, atol=1e-3, rtol=1e-3)
    for at in range(len(maps)):
        others = [-map if number == at else map for number, map in enumerate(maps)]
        assert not torch.allclose(decoder(decoding.given(others)), scores)


@torch.inference_mode()
@pytest.mark.parametrize("name", KINDS)
def test_what_merges_nothing_is_the_network_without_the_library(name: str, vit: nn.Module, images: Tensor) -> None:
    model = under(vit, name)
    dense = decoding.bare(*decoding.parts_of(model))(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SIZE", SIZE)
        rows = (
            under_decoders.Planned("", "", schedule.dense()),
            under_decoders.Unmerged("", "", merging.ToMe(0)),
            under_decoders.Unmerged("", "", merging.Local(1.01, block=2)),
            under_decoders.Smaller(1.0),
        )
        runners = [row.on(model) for row in rows]
        found = [runner.read(runner.run(images)) for runner in runners]
        wanted = decoding.of_pixels(dense)
    for one in found:
        torch.testing.assert_close(one.logits, wanted, atol=1e-4, rtol=1e-4)
        assert one.tokens_per_block.tolist() == [[33] * 4] * 2
        assert one.multiply_adds.tolist() == found[0].multiply_adds.tolist()
    work = model.multiply_adds(model(images)) + model.decoder_multiply_adds()
    assert found[0].multiply_adds.tolist() == work.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("name", KINDS)
def test_what_merges_takes_less(name: str, vit: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SIZE", SIZE)
    model = under(vit, name)
    merges = Schedule(merges=(Merge(1, 2, alike=-1.0),))
    rows = (
        under_decoders.Planned("", "", schedule.dense()),
        under_decoders.Planned("", "", merges),
        under_decoders.Unmerged("", "", merging.ToMe(4)),
        under_decoders.Unmerged("", "", merging.Local(0.0)),
        under_decoders.Smaller(0.5),
    )
    dense, *others = [runner.read(runner.run(images)) for runner in (row.on(model) for row in rows)]
    for one in others:
        assert one.logits.shape == dense.logits.shape
        assert (one.multiply_adds < dense.multiply_adds).all()
        assert (one.tokens_per_block[:, -1] < 33).all()
        assert not torch.allclose(one.logits, dense.logits)


@needs_data
def test_a_training_that_was_stopped_goes_on(
    strips: None, in_float32: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with of_narrow.in_place_of_tiny():
        ready = of_narrow.ready(tmp_path / "ready.npz")
        command = f"decoders train --data {CAMVID} --init {ready} --limit 2 --batch 1 --epochs 2 --device cpu"
        command = f"{command} --fit-images 1 --fit-steps 1 --out".split()

        def started(out: str) -> None:
            monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / out)])
            decoders.main()

        started("whole")
        keep = decoders.checkpoints.keep
        with monkeypatch.context() as patch:
            patch.setattr(decoders.checkpoints, "keep", lambda *args, done: (keep(*args, done=done), _stop()))
            with pytest.raises(KeyboardInterrupt):
                started("halves")
        started("halves")
        for name in decoding.DECODERS:
            whole, halves = (tmp_path / out / f"{name}.safetensors" for out in ("whole", "halves"))
            assert whole.read_bytes() == halves.read_bytes()
        command[command.index("--epochs") + 1] = "3"
        with pytest.raises(shell.UsageError, match="`--out` must be new or a run with the same settings"):
            started("whole")

        json_file = tmp_path / "conv.json"
        common = f"--data {CAMVID} --init {ready} --run {tmp_path / 'whole'} --json {json_file} --device cpu"
        measuring = f"decoders evaluate --decoder conv --limit 1 --rounds 1 --timing-images 1 --batches 1 {common}"
        monkeypatch.setattr(sys, "argv", measuring.split())
        decoders.main()
        results = json.loads(json_file.read_text())
        kinds = {"dense", "merging", "exits, raw features", "ToMe", "local, then global merging", "smaller input"}
        assert {row["kind"] for row in results["settings"].values()} == kinds
        assert [*results["timing"]["1"]["settings"]] == [*results["settings"]]
        monkeypatch.setattr(sys, "argv", [*measuring.replace("--decoder conv", "--decoder dpt").split()])
        with pytest.raises(shell.UsageError, match="`--json` must be .* same inputs, got .* decoder 'conv', not 'dpt'"):
            decoders.main()
        fitting = f"--data {CAMVID} --init {ready} --images 4 --steps 1 --device cpu --out"
        run = f"--run {tmp_path / 'whole'} --decoder dpt"
        for words in (f"{fitting} {tmp_path / 'head'}", f"{fitting} {tmp_path / 'translators'} {run}"):
            monkeypatch.setattr(sys, "argv", ["translators", *words.split()])
            translators.main()
        words = f"evaluate --data {CAMVID} --init {ready} --fitted {tmp_path / 'head'} --leaving --limit 1 --rounds 0"
        only = "--only exits merge foretold cut --device cpu --json"
        monkeypatch.setattr(sys, "argv", [*words.split(), *only.split(), str(tmp_path / "head.json")])
        evaluate.main()
        rows = json.loads((tmp_path / "head.json").read_text())["settings"]
        assert {name for name, row in rows.items() if row["kind"] == "translated"} == {
            *leaving.by_classes(), *leaving.by_error()
        }  # fmt: skip
        json_file.unlink()
        measuring = measuring.replace("--decoder conv", f"--decoder dpt --fitted {tmp_path / 'translators'}")
        monkeypatch.setattr(sys, "argv", [*measuring.replace("--rounds 1", "--rounds 0").split()])
        decoders.main()
        results = json.loads(json_file.read_text())
        assert list(results["settings"]) == ["dense", *leaving.by_error()]
        measuring = measuring.replace(f"--fitted {tmp_path / 'translators'}", "").replace(
            "--decoder dpt", "--decoder conv"
        )
        json_file.unlink()
        (tmp_path / "whole" / "conv.safetensors").write_bytes(b"")
        monkeypatch.setattr(sys, "argv", measuring.split())
        with pytest.raises(shell.UsageError, match="`--run` must hold a decoder of this network"):
            decoders.main()


def _stop() -> None:
    raise KeyboardInterrupt
