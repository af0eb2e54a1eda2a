"""What exits are compared with: merged tokens, smaller images, a compiled dense network."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenexit_torch as tet
from examples import merging, shell
from examples.camvid import baselines, data, evaluate, frontier, merges, report
from examples.timm_import import import_timm
from tests.examples import narrow as of_narrow
from tests.examples.strips import CAMVID, TOKENS, needs_data
from tokenexit import TokenExitError, heads, schedule
from tokenexit_torch.heads import build

SIZE, PATCH, GRID, DEPTH, WIDTH, CLASSES = (32, 48), 8, (4, 6), 6, 24, 5
PATCHES = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def model() -> tet.ExitingModel:
    torch.manual_seed(0)
    vit = import_timm().models.VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=3, num_classes=0
    )
    with torch.no_grad():  # weights as drawn are so small that all tokens are alike
        for block in vit.blocks:
            block.attn.qkv.weight.mul_(10)
    head = build(heads.MLP(16), width=WIDTH, classes=CLASSES)
    return tet.wrap(vit, schedule.dense(after=(2,)), head=head, exit_heads=heads.MLP(4)).eval()


@pytest.fixture
def network(model: tet.ExitingModel) -> merging.Network:
    return merging.Network(model.host, model.head)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


MERGING = {
    "ToMe": merging.ToMe(3),
    "local": merging.Local(0.05),
    "local in a later block": merging.Local(0.05, block=2),
    "local, then global": merging.Local(0.05, then=3),
}


@torch.inference_mode()
@pytest.mark.parametrize("rule", [merging.ToMe(0), merging.Local(1.01), merging.Local(1.01, block=3, then=5)])
def test_nothing_merges_and_the_network_is_dense(
    rule: Any, network: merging.Network, model: tet.ExitingModel, images: Tensor
) -> None:
    made, dense = rule(network, images), model(images, schedule=schedule.dense())
    torch.testing.assert_close(made.logits, dense.logits, atol=1e-5, rtol=1e-5)
    head_on_prefix = WIDTH * 16 + 16 * CLASSES
    compared = (PATCHES // 2) ** 2 * WIDTH if getattr(rule, "then", None) else 0
    wanted = model.multiply_adds(dense) + head_on_prefix + compared
    assert network.multiply_adds(made).tolist() == wanted.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("rule", MERGING.values(), ids=MERGING.keys())
def test_an_image_does_not_depend_on_its_batch(rule: Any, network: merging.Network, images: Tensor) -> None:
    together = rule(network, images)
    alone = [rule(network, image[None]) for image in images]
    assert 1 < together.read[0] < 1 + PATCHES
    for at, one in enumerate(alone):
        torch.testing.assert_close(together.logits[at], one.logits[0], atol=1e-5, rtol=1e-4)
        assert [tuple(counts[at] for counts in work) for work in together.blocks] == [
            tuple(counts[0] for counts in work) for work in one.blocks
        ]
    if isinstance(rule, merging.Local):  # each merges its own windows
        assert len(set(together.read)) > 1


def test_the_most_alike_pair_is_the_first() -> None:
    angles = torch.tensor([0.0, 10, 90, 44, 45, 78])  # patches 1, 3 and 5 look for one of 0, 2 and 4
    patches = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=1) * torch.arange(1, 7)[:, None]
    features = torch.cat([patches[3:4], patches])[None]  # the prefix is just like patch 3
    gone, into, similarity = merging.most_alike(features, 3, prefix=1)
    assert (gone - 1).tolist() == [[3, 1, 5]]
    assert (into - 1).tolist() == [[4, 0, 2]]
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 10, 12]]).deg2rad().cos())
    assert [part.tolist() for part in merging.most_alike(features, 1, prefix=1)[:2]] == [[[4]], [[5]]]


def test_tokens_become_means_and_sizes_are_conserved() -> None:
    batch = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2))
    row = merging.merged(merging.Row.of(batch), torch.tensor([1, 5, 8, 9]), torch.tensor([2, 2, 7, 10]), (4, 4))
    row = merging.merged(row, torch.tensor([1, 6]), torch.tensor([3, 5]), (3, 3))  # by then of sizes 3, 1, 2 and 2
    assert row.entry.tolist() == [[0, 2, 2, 1, 2, 2], [3, 4, 4, 4, 4, 5]]
    assert row.size.tolist() == [1, 1, 4, 1, 4, 1]
    for entry in range(6):
        torch.testing.assert_close(row.tokens[entry], batch[row.entry == entry].mean(0))


def test_patches_get_what_their_token_says(network: merging.Network) -> None:
    network.head = nn.Identity()
    tokens = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    entry = torch.tensor([[0, *(1 + at % 2 for at in range(PATCHES))]])
    embedded = tet.Embedded(torch.zeros(1, 1 + PATCHES, WIDTH), 1, GRID)
    logits = network.read(merging.Row(tokens, torch.ones(3), entry, (3,)), embedded)
    finished = network.host.finish(tokens)
    for at in range(PATCHES):
        assert torch.equal(logits[0, :, at // GRID[1], at % GRID[1]], finished[1 + at % 2])


def test_likeness_of_windows_is_the_mean_over_pairs() -> None:
    tokens = torch.randn(2, 5, 6, 4, generator=torch.Generator().manual_seed(4))  # the last row is in no window
    found = merging.alike(tokens, side=2)
    assert found.shape == (2, 2, 3)
    window = tokens[1, 2:4, 4:6].flatten(0, 1)
    cosines = [functional.cosine_similarity(window[i], window[j], dim=0) for i in range(4) for j in range(i)]
    torch.testing.assert_close(found[1, 1, 2], torch.stack(cosines).mean())


@torch.inference_mode()
def test_constant_blocks_merge(network: merging.Network, monkeypatch: pytest.MonkeyPatch) -> None:
    vit: Any = network.host.module
    monkeypatch.setattr(vit.pos_embed, "data", torch.zeros_like(vit.pos_embed))
    blocks = torch.randn(1, 3, GRID[0] // 2, GRID[1] // 2, generator=torch.Generator().manual_seed(5))
    image = blocks.repeat_interleave(2 * PATCH, dim=2).repeat_interleave(2 * PATCH, dim=3)
    made = merging.Local(0.999)(network, image)
    assert made.read == (1 + PATCHES // 4,)
    assert torch.equal(made.logits[..., ::2, ::2], made.logits[..., 1::2, 1::2])
    assert merging.Local(1.01)(network, image).read == (1 + PATCHES,)


@torch.inference_mode()
def test_work_is_what_is_counted_by_hand(network: merging.Network, images: Tensor) -> None:
    made = merging.ToMe(10)(network, images[:1])
    attention, mlp = [25, 15, 8, 5, 3, 2], [15, 8, 5, 3, 2, 2]  # 24 patches; 10, then the half of 14, 7, 4, 2, 1
    assert [work.attention for work in made.blocks] == [(count,) for count in attention]
    assert [work.mlp for work in made.blocks] == [(count,) for count in mlp]
    pairs = [12 * 12, 7 * 7, 3 * 4, 2 * 2, 1 * 1, 0]
    wanted = PATCHES * 3 * PATCH**2 * WIDTH + mlp[-1] * (WIDTH * 16 + 16 * CLASSES)
    for before, after, compared in zip(attention, mlp, pairs, strict=True):
        wanted += 4 * WIDTH**2 * before + 2 * WIDTH * before**2 + 8 * WIDTH**2 * after + compared * WIDTH // 3
    assert network.multiply_adds(made).tolist() == [wanted]


def test_other_networks_are_refused() -> None:
    other: Any = SimpleNamespace(module=nn.Identity())
    with pytest.raises(TokenExitError, match="`host` must be a timm VisionTransformer with plain blocks"):
        merging.Network(other, nn.Identity())


@torch.inference_mode()
def test_images_of_the_same_size_are_no_smaller(
    model: tet.ExitingModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SIZE", SIZE)
    out = model(images, schedule=schedule.dense())
    dense = out.upsample(SIZE)
    whole, half = (baselines.Smaller(scale).on(model) for scale in (1.0, 0.5))
    same, smaller = (runner.read(runner.run(images)) for runner in (whole, half))
    torch.testing.assert_close(same.logits, dense, atol=1e-5, rtol=1e-5)
    assert torch.equal(same.multiply_adds, model.multiply_adds(out))
    assert smaller.logits.shape == dense.shape
    assert smaller.tokens_per_block.tolist() == [[1 + PATCHES // 4] * DEPTH] * 3
    assert 0 < functional.mse_loss(smaller.logits, dense) < dense.var()


@needs_data
def test_baselines_are_rows_beside_the_others(strips: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_TOME", (80,))
    monkeypatch.setattr(baselines, "_LOCAL", (0.5,))
    monkeypatch.setattr(baselines, "_GLOBAL", (0.5,))
    monkeypatch.setattr(baselines, "_SCALES", (0.5,))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it takes longer than all other tests
    file = tmp_path / "results.json"
    with of_narrow.in_place_of_tiny():
        ready = of_narrow.ready(tmp_path / "ready.npz")
        command = f"evaluate --data {CAMVID} --init {ready} --json {file} --limit 1 --device cpu --rounds 1"
        command = f"{command} --batches 1 --timing-images 1 --fit-after 6 --fit-images 1 --fit-steps 1".split()
        monkeypatch.setattr(sys, "argv", [*command, "--only", "none"])
        assert [*evaluate.evaluate(evaluate.arguments())["settings"]] == ["dense"]
        only = ["--only", "ToMe", "local", "smaller", "dense, compiled"]
        monkeypatch.setattr(sys, "argv", [*command, "--baselines", *only])
        results = evaluate.evaluate(evaluate.arguments())
        rows = {name: entry["kind"] for name, entry in results["settings"].items()}
        assert rows == {
            "dense": "dense", "ToMe, 4 a block": "ToMe", "local merging above 0.5": "local merging",
            "local, then global merging above 0.5": "local, then global merging",
            "smaller input, 0.5 of each side": "smaller input", "dense, compiled": "dense, compiled",
            "dense, compiled, max-autotune": "dense, compiled",
        }  # fmt: skip
        assert json.loads(file.read_text()) == results
        assert [*results["timing"]["1"]["settings"]] == [*rows]
        entries = results["settings"]
        tome, dense = entries["ToMe, 4 a block"], entries["dense"]
        assert tome["tokens_per_block"] == [1 + TOKENS - 4 * block - 2 for block in range(12)]
        assert tome["token_blocks"] == pytest.approx(sum(tome["tokens_per_block"]) / 12 / (1 + TOKENS))
        assert entries["smaller input, 0.5 of each side"]["token_blocks"] == pytest.approx(31 / 121)
        assert entries["dense, compiled"]["agreement"] == 1
        assert entries["dense, compiled"]["multiply_adds"] == dense["multiply_adds"] > tome["multiply_adds"]
        assert len(frontier.rows(results)) == 1 + len(rows)
        assert all(set(rows) == set(points["x"]) for points in frontier.panels({"x": results}, frontier.WORK).values())
        monkeypatch.setattr(evaluate, "accuracy", lambda *_, **__: pytest.fail("measured again"))
        monkeypatch.setattr(evaluate, "timed", lambda *_, **__: pytest.fail("timed again"))
        assert evaluate.evaluate(evaluate.arguments())["settings"] == results["settings"]
        page = ["report", "--data", str(CAMVID), "--json", str(file), "--init", str(ready), "--out", "none.html"]
        monkeypatch.setattr(sys, "argv", [*page, "--setting", "ToMe, 4 a block"])
        with pytest.raises(shell.UsageError, match="`--setting` must be a schedule and no baseline, got 'ToMe"):
            report.content_of(report.arguments())


@needs_data
def test_plans_that_merge_are_rows_of_heads_fitted_as_they_merge(
    strips: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, plan = tmp_path / "results.json", tmp_path / "plan.json"
    settings = {one.name: one.plan for one in merges.merging((2, 3, 4, 6, 8), "fine")}
    plan.write_text(json.dumps(settings["merge 1, 2, 3; exits 6, 8 at 0.9"].to_dict()))
    with of_narrow.in_place_of_tiny():
        ready = of_narrow.ready(tmp_path / "ready.npz")
        command = f"evaluate --data {CAMVID} --init {ready} --json {file} --limit 1 --device cpu --rounds 0"
        command = f"{command} --fit-after 2 3 4 6 8 --fit-images 1 --fit-steps 1 --fit-plan {plan}".split()
        monkeypatch.setattr(sys, "argv", [*command, "--merging", "fine", "--only", "merge"])
        results = evaluate.evaluate(evaluate.arguments())
        assert {*results["settings"]} == {"dense", *settings}
        assert sorted(results["fit"]["agreement_on_train"]) == ["2", "3", "4", "6", "8"]
        assert results["inputs"]["fit_plan"]["merges"]
        monkeypatch.setattr(sys, "argv", [*command[:-2], "--merging", "fine", "--only", "merge"])
        with pytest.raises(shell.UsageError, match="`--json` must be .* results of the same inputs"):
            evaluate.evaluate(evaluate.arguments())
    with pytest.raises(
        shell.UsageError, match=r"`--merging` must come with heads after .*\[2, 3, 4, 6, 8\] for fine, got \[3, 6\]"
    ):
        merges.merging((3, 6), "fine")
