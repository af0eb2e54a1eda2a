"""The NNX reference ViT: the numbers of timm's, from timm's weights, which are checked one by one."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax import numpy as jnp
from safetensors.torch import save_file

from tests.jax.parity import same
from tests.timm_import import import_timm
from tokenexit import TokenExitError
from tokenexit_jax.models import vit, weights

SIZE, PATCH, WIDTH, DEPTH = (16, 24), 4, 24, 3
timm = import_timm()

CONFIGURATIONS = {
    "plain": ({}, {}),
    "no class token": ({"class_token": False}, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "registers, positions of all": ({"registers": 3}, {"reg_tokens": 3}),
    "registers, positions of patches": (
        {"registers": 2, "positions": "patches", "final_norm": False},
        {"reg_tokens": 2, "no_embed_class": True, "final_norm": False},
    ),
    "layer scale and qk norm": ({"layer_scale": True, "qk_norm": True}, {"init_values": 0.5, "qk_norm": True}),
    "no bias, narrow": (
        {"qkv_bias": False, "hidden": 36, "heads": 2, "channels": 1},
        {"qkv_bias": False, "mlp_ratio": 1.5, "num_heads": 2, "in_chans": 1},
    ),
}
each = pytest.mark.parametrize(("ours", "theirs"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())


def config(**changes):
    return vit.Config(**({"image_size": SIZE, "patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": 3} | changes))


def drawn(seed=0, **changes):
    """A network of a single block with random weights."""
    return nnx.jit(lambda: vit.ViT(config(depth=1, **changes), rngs=nnx.Rngs(seed)))()


def timm_vit(**changes):
    torch.manual_seed(0)
    options = {
        "img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3, "num_classes": 0,
    }  # fmt: skip
    model = timm.models.vision_transformer.VisionTransformer(**options | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # every weight differs from what it is initialised with
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def pictures(channels=3):
    return np.random.default_rng(0).normal(size=(2, *SIZE, channels)).astype(np.float32)


@torch.no_grad()
@each
def test_the_tokens_are_those_of_timm_whole_and_in_parts(ours, theirs):
    reference = timm_vit(**theirs)
    images = pictures(ours.get("channels", 3))
    wanted = reference.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2))
    model = vit.load(config(**ours), arrays(reference))
    network, params = vit.split(model)

    @jax.jit
    def by_parts(params, images):
        embedded = network.embed(params, images)
        tokens = embedded.tokens
        for block in network.blocks:
            tokens = block(params, tokens, jnp.ones(tokens.shape[:2]), None)
        return embedded, network.finish(params, tokens)

    embedded, tokens = by_parts(params, jnp.asarray(images))
    same(nnx.jit(lambda model, images: model(images))(model, jnp.asarray(images)), wanted, 1e-4)
    same(tokens, wanted, 1e-4)
    assert embedded.prefix == model.config.prefix == reference.num_prefix_tokens
    assert embedded.grid == model.config.grid == (4, 6)
    assert (network.width, network.depth) == (WIDTH, DEPTH)


def test_the_adapter_loads_neither_flax_nor_optax_nor_equinox_nor_torch():
    code = """
import sys, tokenexit_jax
loaded = {"flax", "optax", "equinox", "torch"} & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_networks_of_one_configuration_are_one_program():
    (one, params), (same_one, others) = (vit.split(drawn(seed)) for seed in (0, 1))
    (deeper, _) = vit.split(drawn(0, layer_scale=True))
    assert one == same_one
    assert hash(one) == hash(same_one)
    assert one != deeper
    assert jax.tree.structure(params) == jax.tree.structure(others)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_come_from_files_in_half_precision_as_well(tmp_path, suffix):
    reference = timm_vit(num_classes=7)
    file = tmp_path / f"weights{suffix}"
    halves = {name: value.half() for name, value in reference.state_dict().items()}
    if suffix == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in halves.items()})
    else:
        save_file(halves, file)
    read = weights.read(file)
    assert read["pos_embed"].dtype == np.float16
    model = vit.load(config(), read, besides=("head.",))
    assert model.pos_embed.dtype == jnp.float32
    same(model.blocks[1].attn.qkv.kernel[...], halves["blocks.1.attn.qkv.weight"].T.float(), 0)


def test_bfloat16_is_read(tmp_path):
    save_file({"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    same(weights.read(tmp_path / "a.safetensors")["a"].astype(np.float32), np.array([1.5, -2.0]), 0)


def without(name):
    return lambda arrays: arrays.pop(name)


def misshapen(arrays):
    arrays["pos_embed"] = arrays["pos_embed"][:, 1:]


def unknown(arrays):
    arrays["blocks.3.norm1.weight"] = np.zeros(3)


@pytest.mark.parametrize(("damage", "message"), [
    (without("cls_token"), r"`weights` must hold every tensor .* missing \['cls_token'\] \(1 in all\), unknown \[\]"),
    (unknown, r"missing \[\] \(0 in all\), unknown \['blocks.3.norm1.weight'\]"),
    (misshapen, r"`weights` must have the shapes .* pos_embed: \(1, 24, 24\) instead of \(1, 25, 24\)"),
])  # fmt: skip
def test_every_weight_is_checked(damage, message):
    given = arrays(timm_vit())
    damage(given)
    with pytest.raises(TokenExitError, match=message):
        vit.load(config(), given)


def test_a_transposed_kernel_is_refused():
    given = arrays(timm_vit())
    given["blocks.0.mlp.fc1.weight"] = given["blocks.0.mlp.fc1.weight"].T
    with pytest.raises(TokenExitError, match=r"blocks.0.mlp.fc1.weight: \(24, 96\) instead of \(96, 24\)"):
        vit.load(config(), given)


def test_nothing_is_passed_over_unless_it_is_said():
    with pytest.raises(TokenExitError, match=r"unknown \['head.bias', 'head.weight'\]"):
        vit.load(config(), arrays(timm_vit(num_classes=2)))


@pytest.mark.parametrize("name", ["pickled.npz", "broken.npz", "broken.safetensors"])
def test_files_are_never_unpickled(tmp_path, name):
    file = tmp_path / name
    if name == "pickled.npz":
        np.savez(file, a=np.array([{"an": "object"}], dtype=object))
    else:
        file.write_bytes(b"not what it says")
    with pytest.raises(TokenExitError, match="`file` must hold plain arrays, got"):
        weights.read(file)


@pytest.mark.parametrize("name", ["absent.npz", "weights.pth"])
def test_only_two_kinds_of_files_are_read(tmp_path, name):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(TokenExitError, match=r"`file` must be an existing .npz or .safetensors file, got"):
        weights.read(tmp_path / name)


@pytest.mark.parametrize(("changes", "message"), [
    ({"patch": 5}, r"`image_size` must be a height and a width that 5 divides, got \(16, 24\)"),
    ({"heads": 5}, "`heads` must divide the width, 24, got 5"),
    ({"depth": 0}, "`depth` must be a whole number from 1 up, got 0"),
    ({"registers": -1}, "`registers` must be a whole number from 0 up, got -1"),
    ({"hidden": 0}, "`hidden` must be None or from 1 up, got 0"),
    ({"positions": "cls"}, "`positions` must be 'all' or 'patches', got 'cls'"),
])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_a_configuration_that_makes_no_network_is_refused(changes, message):
    with pytest.raises(TokenExitError, match=message):
        config(**changes)


def test_images_of_another_size_are_refused():
    model = drawn()
    with pytest.raises(TokenExitError, match=r"`images` must have shape \(images, 16, 24, 3\), got \(1, 24, 16, 3\)$"):
        model(jnp.zeros((1, 24, 16, 3)))


def test_channels_that_come_first_are_named():
    message = r"`images` must have shape \(images, 16, 24, 3\), got \(1, 3, 16, 24\): the channels come first, and belong last"
    with pytest.raises(TokenExitError, match=message):
        drawn()(jnp.zeros((1, 3, 16, 24)))
