"""Many devices, and batches of any size: in processes of their own, for devices are counted when JAX starts.

Programs for many devices are compiled as users compile them; what they are compared with, as all other tests do it.
"""

import os
import subprocess
import sys

SETTING = """
import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

import tokenexit_jax as tej
from tests.jax import networks
from tests.torch import models
from tokenexit import schedule

def quickly(function):
    options = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    options |= {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)

params = networks.pair("plain").params
plan = schedule.neighbours(radius={1: 0}, threshold=0.5, per_class=0)
model = tej.wrap(networks.plain_network(depth=2), plan, classes=4, capacities=(0.5, 1.0))
heads = quickly(model.init)(jax.random.key(0))
for head in (heads["exit_heads"]["1"], heads["head"]):
    head["3.weight"] = head["3.weight"] * 40
images = networks.images_of(models.images(4, networks.SIZE))

gated = tej.wrap_gates(networks.plain_network(depth=2), schedule.svit(after=(1,)), capacities=(0.5, 1.0))
gates = quickly(gated.init)(jax.random.key(1))
gates["1"]["3.weight"] = gates["1"]["3.weight"] * 20

def same_gated(found, wanted):
    np.testing.assert_array_equal(found.keep, wanted.keep)
    np.testing.assert_array_equal(found.tokens_per_block, wanted.tokens_per_block)
    np.testing.assert_allclose(found.maps[2], wanted.maps[2], rtol=1e-5, atol=1e-5)

def same(found, wanted):
    np.testing.assert_array_equal(found.exit_depth, wanted.exit_depth)
    np.testing.assert_array_equal(found.tokens_per_block, wanted.tokens_per_block)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)

def between(values):
    # Halfway between two of them, the farthest apart first: rounding differs from one program to another.
    some = np.unique(values)
    return ((some[:-1] + some[1:]) / 2)[np.argsort(some[:-1] - some[1:])].tolist()

# So that two images need the greater bucket, and the others do not.
logits = quickly(lambda images: model.every_exit(params, heads, images)[1])(images)
certain = np.asarray(quickly(lambda logits: jax.nn.softmax(logits).max(axis=-1))(logits))
stay = {t: (certain <= t).sum(axis=(1, 2)) for t in between(certain)}
threshold = next(t for t, many in stay.items() if np.sort(many)[1] <= 10 < np.sort(many)[2])
images = jnp.asarray(np.asarray(images)[np.argsort(stay[threshold])])
plan = plan.with_threshold(threshold)
"""

SHARDED = """
alone = quickly(model.compiled)(params, heads, images, plan)
alone_by_gates = quickly(gated.compiled)
assert jax.device_count() == 4
# By gates as well two images need the greater bucket.
probability = np.asarray(alone_by_gates(params, gates, images, gated.schedule).probability)[:, 0].reshape(4, -1)
stay = {t: (probability >= t).sum(axis=1) for t in between(probability)}
wanted_share = next(t for t, many in stay.items() if max(many[:2]) <= 10 < min(many[2:]))
for devices in (2, 4):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    specs = (P(), P(), P("data"), P())
    spread = jax.device_put(images, NamedSharding(mesh, P("data")))
    program = jax.jit(jax.shard_map(model.compiled, mesh=mesh, in_specs=specs, out_specs=P("data")))
    program = program.lower(params, heads, spread, plan).compile()
    found = program(params, heads, spread, plan)
    same(found, alone)
    room = np.asarray(found.capacity_per_block)[:, 1]
    assert set(room.tolist()) == {10, 20}, room
    assert found.logits.sharding.num_devices == devices
    text = program.as_text()
    talk = [word for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if word in text]
    assert not talk, talk
    shares = gated.retuned(schedule.svit(after=(1,), threshold=wanted_share)).schedule
    by_gates = jax.jit(jax.shard_map(gated.compiled, mesh=mesh, in_specs=specs, out_specs=P("data")))
    by_gates = by_gates.lower(params, gates, spread, shares).compile()
    kept = by_gates(params, gates, spread, shares)
    same_gated(kept, alone_by_gates(params, gates, images, shares))
    assert set(np.asarray(kept.capacity_per_block)[:, 1].tolist()) == {10, 20}
    text = by_gates.as_text()
    assert not [word for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if word in text]
assert set(np.asarray(alone.capacity_per_block)[:, 1].tolist()) == {20}
"""

EXPORTED = """
from jax import export
(images_many,) = export.symbolic_shape("images")
wide = schedule.neighbours(radius={1: 1}, threshold=0.4, per_class=1).exits[0].policy
wide = schedule.Schedule((schedule.Exit(1, wide.with_minimum(per_image=3)),), cell=2)
for plan, counts in ((wide, (1, 4)), (schedule.paumer(keep={1: 0.4}), (4,))):
    program = jax.jit(lambda images, plan=plan: model.compiled(params, heads, images, plan))
    shape = jax.ShapeDtypeStruct((images_many, *images.shape[1:]), images.dtype)
    exported = export.export(program)(shape)
    wanted = program(images)
    assert len(np.unique(wanted.exit_depth)) == 2
    for count in counts:
        same(exported.call(images[:count]), jax.tree.map(lambda one: one[:count], wanted))
for way in (gated.compiled, gated.masked):
    program = jax.jit(lambda images, way=way: way(params, gates, images))
    exported = export.export(program)(shape)
    same_gated(exported.call(images[:3]), jax.tree.map(lambda one: one[:3], program(images)))
"""


def run(code, *, devices=1):
    many = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(many if devices > 1 else {})}
    command = [sys.executable, "-c", SETTING + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_each_shard_chooses_its_own_bucket_without_a_word_to_the_others():
    done = run(SHARDED, devices=4)
    assert done.returncode == 0, done.stderr


def test_a_program_for_batches_of_any_size():
    done = run(EXPORTED)
    assert done.returncode == 0, done.stderr
