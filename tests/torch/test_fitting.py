import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.fits import Again, same, stopping, weights_of
from tokenexit import TokenExitError, heads, schedule
from tokenexit_torch import _files
from tokenexit_torch.training._teacher import Teacher, label_share


def fitted(images, **options):
    model = models.wrapped(models.timm_vit, schedule.dense())
    return model, tet.fit_exits(model, images, **{"steps": 150, "patches_per_step": 96, "progress": iter} | options)


def test_heads_learn_what_the_final_head_says_and_nothing_else_changes():
    images = models.images(12)
    model = models.wrapped(models.timm_vit, schedule.dense())
    wanted = model.every_exit(images)[6].argmax(dim=1)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("exit_heads")}
    before = {
        after: (logits.argmax(dim=1) == wanted).float().mean() for after, logits in model.every_exit(images).items()
    }
    report = tet.fit_exits(model, images, steps=300, patches_per_step=96, progress=iter)
    exits = model.every_exit(images)
    for after in (2, 3, 4):
        agreement = (exits[after].argmax(dim=1) == wanted).float().mean().item()
        assert agreement > before[after] + 0.2
        assert report.agreement[after] == pytest.approx(agreement, abs=1e-6)
    assert report.patches == 12 * 24
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_batches_give_what_one_tensor_gives_and_the_same_twice():
    images = models.images(10)
    one, _ = fitted(images)
    same, _ = fitted(part for part in (images[:8], images[8:]))
    for a, b in zip(one.exit_heads.parameters(), same.exit_heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_half_precision_a_bad_image_and_inference_mode_are_no_obstacle():
    images = models.images(6)
    images[2] = float("nan")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.inference_mode():
            model = models.wrapped(models.timm_vit, schedule.dense()).to(dtype)
            report = tet.fit_exits(model, images.to(dtype), steps=40, patches_per_step=64, progress=iter)
        assert report.patches == 5 * 24
        assert all(p.dtype == dtype and p.isfinite().all() for p in model.exit_heads.parameters())
        assert min(report.agreement.values()) > 0.5


def test_an_interrupt_leaves_the_heads_as_they_were():
    model = models.wrapped(models.timm_vit, schedule.dense())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupted(loop):
        for turn, item in enumerate(loop):
            if turn == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(model, models.images(), steps=9, progress=interrupted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_heads_are_fitted_in_training_mode_and_put_back():
    model = tet.wrap(
        models.timm_vit(), schedule.dense(after=(2,)), num_classes=5, exit_heads=heads.FCN(hidden=8)
    ).eval()
    before = model.exit_heads["2"][1].running_mean.clone()
    tet.fit_exits(model, models.images(), steps=5, progress=iter)
    assert not torch.equal(model.exit_heads["2"][1].running_mean, before)
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("cache", ["memory", "disk", None])
def test_images_held_out_are_not_fitted_to(cache, tmp_path):
    images, others = models.images(10), models.images(10, seed=1)
    found = []
    for last in (images, others):
        both = torch.cat([images[:7], last[7:]])  # the batches are 8 and 2: one of them is cut
        where = tmp_path / str(len(found)) if cache == "disk" else cache
        found.append(fitted(both, held_out=0.3, steps=30, check_every=30, cache=where))
    (one, report), (other, another) = found
    assert same(weights_of(one), weights_of(other))
    assert report.agreement == another.agreement
    assert report.held_out.agreement != another.held_out.agreement
    assert (report.images, report.patches, report.held_out.images, report.held_out.patches) == (7, 7 * 24, 3, 3 * 24)
    with torch.no_grad():
        said = one.every_exit(images[7:])
        for after in (2, 3, 4):
            agreement = (said[after].argmax(dim=1) == said[6].argmax(dim=1)).float().mean().item()
            assert report.held_out.agreement[after] == pytest.approx(agreement, abs=1e-6)


def test_a_fit_without_images_held_out_is_that_of_the_images_fitted_to():
    images = models.images(10)
    part, _ = fitted(images, held_out=0.2, steps=20, check_every=20)
    alone, report = fitted(images[:8], steps=20)
    assert same(weights_of(part), weights_of(alone))
    assert report.held_out is None
    assert (report.steps, report.kept_step, report.stopped_early) == (20, 20, False)


OVERFITTING = {"held_out": 0.5, "check_every": 10, "learning_rate": 0.01, "steps": 600, "patches_per_step": 96}


def test_a_fit_stops_when_it_gets_worse_on_images_held_out_and_keeps_the_best_heads():
    images = models.images(16)
    model, report = fitted(images, **OVERFITTING, patience=6)
    assert report.stopped_early
    assert report.steps == report.kept_step + 60 < 600
    assert (report.images, report.held_out.images) == (8, 8)
    last, _ = fitted(images[:8], learning_rate=0.01, steps=600)  # the same fit without a stop
    with torch.no_grad():
        exits, scores, *_ = model.patches_and_output(images[8:])
        wish = scores.softmax(dim=-1).flatten(0, 1)

    def loss(heads):
        said = {after: head(exits[int(after)]).flatten(0, 1) for after, head in heads.items()}
        return sum(torch.nn.functional.cross_entropy(one, wish).item() for one in said.values())

    assert loss(model.exit_heads) < loss(last.exit_heads)


def test_the_best_heads_are_those_of_the_step_that_is_reported(tmp_path):
    images = models.images(16)
    model, report = fitted(images, **OVERFITTING)
    assert 0 < report.kept_step < report.steps
    again = models.wrapped(models.timm_vit, schedule.dense())
    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(again, images, resume=tmp_path, progress=stopping(report.kept_step), **OVERFITTING)
    then = load_file(tmp_path / "fit.safetensors")
    assert all(torch.equal(value, then[f"heads.{name}"]) for name, value in weights_of(model).items())


@pytest.mark.parametrize("cache", ["memory", "disk", None])
@pytest.mark.parametrize("at", [7, 20, 33])
def test_an_interrupted_fit_ends_as_if_it_had_not_been(cache, at, tmp_path):
    images = Again(models.images(4), models.images(3, seed=1), models.images(3, seed=2))
    where = tmp_path / "tokens" if cache == "disk" else cache
    options = {"held_out": 0.2, "check_every": 10, "patience": 4, "steps": 50, "learning_rate": 0.02, "cache": where}
    straight, report = fitted(images, **options)
    model = models.wrapped(models.timm_vit, schedule.dense())
    before = weights_of(model)
    folder = tmp_path / "fit"
    options |= {"patches_per_step": 96, "resume": folder}
    for left in (at, 4):  # interrupted twice
        with pytest.raises(KeyboardInterrupt):
            tet.fit_exits(model, images, progress=stopping(left), **options)
        assert same(weights_of(model), before)
        assert [file.name for file in folder.iterdir()] == ["fit.safetensors"]
    steps = []
    resumed = tet.fit_exits(model, images, progress=lambda loop: steps.append(loop) or loop, **options)
    assert len(steps[-1]) == 50 - at - 4
    assert resumed == report
    assert same(weights_of(model), weights_of(straight))
    assert not [*folder.iterdir()]


def test_an_interrupt_within_a_step_costs_what_came_after_the_last_check(tmp_path, monkeypatch):
    images = models.images(4)
    straight, report = fitted(images, steps=30, check_every=10)
    model = models.wrapped(models.timm_vit, schedule.dense())
    step, taken = torch.optim.AdamW.step, []

    def interrupted(self, *given):
        step(self, *given)
        taken.append(1)
        if len(taken) == 17:
            raise KeyboardInterrupt

    options = {"steps": 30, "check_every": 10, "patches_per_step": 96, "resume": tmp_path, "progress": iter}
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tet.fit_exits(model, images, **options)
    assert tet.fit_exits(model, images, **options) == report
    assert same(weights_of(model), weights_of(straight))


def test_a_fit_that_was_about_to_stop_stops_when_it_goes_on(tmp_path):
    images = models.images(16)
    straight, report = fitted(images, **OVERFITTING)
    with pytest.raises(KeyboardInterrupt):
        fitted(images, **OVERFITTING, resume=tmp_path, progress=stopping(report.steps))
    model, resumed = fitted(images, **OVERFITTING, resume=tmp_path)
    assert resumed == report
    assert same(weights_of(model), weights_of(straight))


def test_batch_norm_and_an_unseeded_new_model_resume_too(tmp_path):
    def wrapped(seed):
        vit = models.timm_vit()
        torch.manual_seed(3)
        final = torch.nn.Linear(48, 5)
        torch.manual_seed(seed)
        return tet.wrap(vit, schedule.dense(after=(2,)), head=final, exit_heads=heads.FCN(hidden=8)).eval()

    images, options = models.images(4), {"steps": 12, "patches_per_step": 50}
    straight = wrapped(0)
    report = tet.fit_exits(straight, images, progress=iter, **options)
    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(wrapped(0), images, progress=stopping(5), resume=tmp_path, **options)
    other = wrapped(1)
    assert tet.fit_exits(other, images, progress=iter, resume=tmp_path, **options) == report
    assert same(weights_of(other), weights_of(straight))


def test_another_fit_is_not_resumed(tmp_path):
    images, pairs = models.images(4), torch.zeros(4, 32, 48, dtype=torch.int64)
    options = {"steps": 12, "patches_per_step": 50, "resume": tmp_path, "progress": iter}
    model = models.wrapped(models.timm_vit, schedule.dense())
    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(model, images, **options | {"progress": stopping(5)})
    changed = models.wrapped(models.timm_vit, schedule.dense())
    with torch.no_grad():
        changed.head[-1].bias[0] += 1
    fewer = models.wrapped(models.timm_vit, schedule.dense(), after=(2, 3))
    for name, one, batches, given in [
        ("model", changed, images, {}),
        ("exits", fewer, images, {}),
        ("images", model, images + 1, {}),
        ("images", model, [(images, pairs)], {}),
        ("steps", model, images, {"steps": 13}),
        ("learning_rate", model, images, {"learning_rate": 0.1}),
        ("held_out", model, images, {"held_out": 0.3}),
        ("label_weight", model, images, {"label_weight": 0.1}),
        ("generator", model, images, {"generator": torch.Generator().manual_seed(5)}),
        ("cache", model, images, {"cache": None}),
    ]:
        with pytest.raises(TokenExitError, match=f"`resume` must be for the same {name} as fit.safetensors in it"):
            tet.fit_exits(one, batches, **options | given)
    (tmp_path / "fit.safetensors").write_bytes(b"nothing")
    with pytest.raises(TokenExitError, match="`resume` must hold a valid fit.safetensors"):
        tet.fit_exits(model, images, **options)


def test_where_a_fit_is_must_be_as_it_was_written_and_possible(tmp_path):
    """What is damaged is seen by its hash; what was written with one is looked at all the same."""
    images, file = models.images(4), tmp_path / "fit.safetensors"
    options = {"steps": 12, "check_every": 3, "patches_per_step": 50, "held_out": 0.3, "resume": tmp_path}
    model = models.wrapped(models.timm_vit, schedule.dense())
    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(model, images, **options, progress=stopping(7))
    raw = file.read_bytes()
    tensors, marks = _files.read(file, "resume")
    tensors = {name: value.clone() for name, value in tensors.items()}
    where = json.loads(marks["where"])
    moment = next(name for name in tensors if name.startswith("optimizer.exp_avg."))

    def without(name):
        return {key: value for key, value in tensors.items() if key != name}

    for changed, place, message in (
        (tensors, where | {"step": math.inf}, "`step` must be a whole number from 0 to 12, got inf"),
        (tensors, where | {"step": 10**9}, "`step` must be a whole number from 0 to 12, got 1000000000"),
        (tensors, where | {"step": -5}, "`step` must be a whole number from 0 to 12, got -5"),
        (tensors, where | {"step": 1.0}, "`step` must be a whole number from 0 to 12, got 1.0"),
        (tensors, where | {"checks_since": 99}, "`checks_since` must be a whole number from 0 to 5, got 99"),
        (tensors, where | {"best": [math.nan, 1]}, "`best` must be a loss and a step from 0 to"),
        (tensors, where | {"best": [1.0, 12]}, "`best` must be a loss and a step from 0 to"),
        (tensors, where | {"best": None}, "hold where this fit is, got best.2.0.bias"),
        (tensors, [], "`where` must have the keys"),
        (without(moment), where, "hold where this fit is, got optimizer.exp_avg"),
        (without("generator"), where, "hold the state of the generator, got another kind, or none"),
        (tensors | {"generator": torch.zeros(3)}, where, "hold the state of the generator"),
        (tensors | {moment: tensors[moment][:1]}, where, "hold where this fit is, got optimizer.exp_avg"),
        (tensors | {moment: tensors[moment] * math.nan}, where, "all of them finite, got NaN or infinity in optimizer"),
        (tensors | {moment: tensors[moment].long()}, where, "in float16, .*, got optimizer.exp_avg.* in int64"),
    ):
        _files.write(file, changed, marks | {"where": json.dumps(place)}, argument="resume")
        with pytest.raises(TokenExitError, match=message):
            tet.fit_exits(model, images, **options, progress=iter)
    for damaged in (raw[:-400] + bytes(400), bytes([*raw[:-9], raw[-9] ^ 1, *raw[-8:]])):
        file.write_bytes(damaged)
        with pytest.raises(TokenExitError, match="`resume` must hold fit.safetensors as it was written"):
            tet.fit_exits(model, images, **options, progress=iter)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(TokenExitError, match="`resume` must hold a valid fit.safetensors, got .* which is no file"):
        tet.fit_exits(model, images, **options, progress=iter)


def test_what_is_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    model, options = models.wrapped(models.timm_vit, schedule.dense()), {"steps": 2, "progress": iter}
    for name in ("resume", "cache"):
        with pytest.raises(TokenExitError, match=f"`{name}` must be a folder that can be written to, got "):
            tet.fit_exits(model, models.images(2), **options, **{name: tmp_path / "file"})


def test_two_processes_may_go_on_with_one_fit(tmp_path):
    """Each has files of its own until they are whole, and neither is stopped by the other's end."""
    images = models.images(4)
    options = {"steps": 20, "check_every": 1, "patches_per_step": 50, "progress": iter, "resume": tmp_path}
    wanted, _ = fitted(images, **options)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                model, _ = fitted(images, **options)
                pairs = zip(model.exit_heads.parameters(), wanted.exit_heads.parameters(), strict=True)
                os._exit(0 if all(torch.equal(one, other) for one, other in pairs) else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_on_disk_is_what_is_kept_in_memory_and_is_read_again(tmp_path):
    batches = [models.images(3), models.images(8, seed=1), models.images(2, seed=2)]
    batches[1][4:] = float("nan")
    batches[2][:] = float("nan")
    one, report = fitted(batches, steps=20)
    model = models.wrapped(models.timm_vit, schedule.dense())
    seen, run = [], model.host.run

    def progress(loop):
        for turn, batch in enumerate(loop):
            if turn == 2:
                raise KeyboardInterrupt
            yield batch

    options = {"steps": 20, "patches_per_step": 96, "cache": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(model, batches, progress=progress, **options)
    model.host.run = lambda *given: seen.append(1) or run(*given)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.safetensors", "000001.safetensors"]
    assert tet.fit_exits(model, batches, progress=iter, **options) == report
    assert len(seen) == 6  # the blocks, for the batch that was missing
    assert same(weights_of(model), weights_of(one))
    assert report.patches == 7 * 24
    with pytest.raises(TokenExitError, match="`cache` must be for the same images as 000001.safetensors in it"):
        tet.fit_exits(model, [batches[0], batches[0]], progress=iter, **options)
    with torch.no_grad():
        model.head[-1].bias[0] += 1
    with pytest.raises(TokenExitError, match="`cache` must be for the same model as 000000.safetensors in it"):
        tet.fit_exits(model, batches, progress=iter, **options)


def test_a_stream_runs_the_network_at_every_step_and_keeps_nothing():
    images = Again(models.images(4), models.images(4, seed=1), torch.full((1, 3, 32, 48), float("nan")))
    model, report = fitted(images, cache=None, steps=90)
    assert images.passes == 1 + 30 + 1  # to count, to fit, to report
    assert report.patches == 8 * 24
    cached, other = fitted(images, steps=90)
    for after, agreement in report.agreement.items():
        assert agreement == pytest.approx(other.agreement[after], abs=0.15)
    assert not same(weights_of(model), weights_of(cached))  # batch by batch, and not from all


def test_a_stream_that_changes_is_refused():
    images = models.images(12)
    loader = torch.utils.data.DataLoader(images, batch_size=2, shuffle=True)
    with torch.random.fork_rng(), pytest.raises(TokenExitError, match="`images` must give the same batches in the sam"):
        fitted(loader, cache=None)
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    assert fitted(loader, cache=None, steps=3)[1].images == 12
    with pytest.raises(TokenExitError, match="`images` must be a tensor or what can be iterated again, if nothing is"):
        fitted(iter(loader), cache=None)


def test_labels_are_followed_as_far_as_they_weigh():
    images = models.images(8)
    label = torch.randint(5, (8, 4, 6), generator=torch.Generator().manual_seed(0))
    pixels = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    pixels[:, ::2] = 255  # half of the pixels of every patch
    batches = list(zip(images.split(4), pixels.split(4), strict=True))

    def right(weight, given=batches):
        model, report = fitted(given, label_weight=weight, ignore=255, steps=400, learning_rate=0.01)
        with torch.no_grad():
            said = model.every_exit(images)[4].argmax(dim=1)
        return (said == label).float().mean().item(), report.agreement[4]

    followed, disagreement = right(1.0)
    ignored, agreement = right(0.0)
    assert followed > ignored + 0.15
    assert agreement > disagreement + 0.15
    unlabelled = [(one, torch.full_like(of, 255)) for one, of in batches]
    assert right(1.0, unlabelled) == right(0.0, list(images.split(4))) == (ignored, agreement)


@pytest.mark.parametrize(("height", "width", "grid"), [(8, 12, (2, 3)), (9, 7, (2, 3)), (1, 2, (2, 3))])
def test_shares_of_labels_are_counted_patch_by_patch(height, width, grid):
    label = torch.randint(-1, 4, (2, height, width), generator=torch.Generator().manual_seed(1))
    shares = label_share(label, grid, classes=4, ignore=-1)
    for image in range(2):
        for patch in range(grid[0] * grid[1]):
            inside = [
                int(label[image, y, x])
                for y in range(height)
                for x in range(width)
                if (y * grid[0] // height, x * grid[1] // width) == divmod(patch, grid[1])
            ]
            wanted = [inside.count(one) / max(len(inside), 1) for one in range(4)]
            assert shares[image, patch].tolist() == pytest.approx(wanted)


def test_the_target_of_a_patch_is_what_the_page_says():
    model = models.wrapped(models.timm_vit, schedule.dense())
    images, label = models.images(1), torch.full((1, 4, 6), 2)
    label[0, 0, 0] = -100
    teacher = Teacher(model, model.patches_and_output, label_weight=0.25, ignore=-100)
    target = teacher.rows((images, label))[0]["target"]
    with torch.no_grad():
        said = model.every_exit(images)[6].softmax(dim=1)[0].flatten(1).T
    torch.testing.assert_close(target[0], said[0])
    torch.testing.assert_close(target[1:], 0.75 * said[1:] + 0.25 * torch.eye(5)[2])


def test_batch_norm_learns_nothing_of_images_held_out():
    def weights(images, **options):
        torch.manual_seed(0)
        model = tet.wrap(models.timm_vit(), schedule.dense(after=(2,)), num_classes=5, exit_heads=heads.FCN(hidden=8))
        tet.fit_exits(model, images, steps=6, patches_per_step=50, progress=iter, **options)
        return weights_of(model)

    images = models.images(4)
    assert same(weights(images, held_out=0.5, check_every=6), weights(images[:2]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: tet.fit_exits(m, None), "`images` must be a tensor of images, or batches of them, got NoneType"),
        (lambda m: tet.fit_exits(m, [1]), "`images` must come in batches that are a tensor, or a pair of images and"),
        (lambda m: tet.fit_exits(m, models.images().to("meta")), "`images` must be dense tensors with numbers in them"),
        (
            lambda m: tet.fit_exits(m, models.images()[0]),
            r"`images` must be of shape \(images, channels, height, width\)",
        ),
        (lambda m: tet.fit_exits(m, models.images(), progress=None), "`progress` must be a function around a loop"),
        (lambda m: tet.fit_exits(m, []), "`images` must hold at least one image, got none"),
        (lambda m: tet.fit_exits(m, models.images() * float("nan")), "`images` must give finite tokens, got NaN"),
        (
            lambda m: tet.fit_exits(m, models.images(), patches_per_step=1),
            "`patches_per_step` must be at least 2, got 1",
        ),
        (lambda m: tet.fit_exits(m, models.images(), steps=0), "`steps` must be at least 1, got 0"),
        (lambda m: tet.fit_exits(m, models.images(), check_every=0), "`check_every` must be at least 1, got 0"),
        (lambda m: tet.fit_exits(m, models.images(), patience=0), "`patience` must be at least 1, got 0"),
        (lambda m: tet.fit_exits(m, models.images(), held_out=1.0), "`held_out` must be at least 0 and less than 1"),
        (lambda m: tet.fit_exits(m, models.images(1), held_out=0.1), "`held_out` must leave some of 1 images to be"),
        (lambda m: tet.fit_exits(m, models.images(), label_weight=2), "`label_weight` must be between 0 and 1, got 2"),
        (lambda m: tet.fit_exits(m, models.images(), cache="disk"), '`cache` must be "memory", a pathlib.Path or None'),
        (lambda m: tet.fit_exits(m, [[models.images()]]), "`images` must come in batches that are a tensor, or a pair"),
        (
            lambda m: tet.fit_exits(m, [(models.images(), torch.zeros(3, 32, 48))], progress=iter),
            r"`images` must come with labels that are whole numbers of shape \(3, height, width\), got torch.float32",
        ),
        (
            lambda m: tet.fit_exits(m, [(models.images(), torch.full((3, 32, 48), 7))], progress=iter),
            "`images` must have labels from 0 to 4, or -100 to be ignored, got 7 to 7",
        ),
        (
            lambda m: tet.fit_exits(m.model, models.images()),
            "`model` must be wrapped by `wrap` or `wrap_decoder`, got VisionTransformer",
        ),
        (
            lambda m: tet.fit_exits(tet.wrap(models.timm_vit(), schedule.dense(), num_classes=3), models.images()),
            "`model` must have exit heads, got none",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(TokenExitError, match=message):
        call(models.wrapped(models.timm_vit, schedule.dense()))
