"""Networks with gates in both frameworks, on the same weights."""

import functools
from dataclasses import dataclass

import jax
import torch
from torch import nn

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax import networks
from tests.jax.parity import from_torch
from tests.torch import models
from tokenexit import schedule

AFTER = (1, 2, 3)
TAPS = (2, 4)


def head(params, tokens):
    return networks.linear(params, "classes", tokens)


@functools.cache
def program(model, way):
    """Compiled once for all tests."""
    return jax.jit(getattr(model, way))


@dataclass(frozen=True)
class Gated:
    """One network in both frameworks, with gates after blocks 1, 2 and 3 of 4, on the same weights."""

    theirs: tet.GatedModel
    model: tej.GatedModel
    params: dict
    gates: dict

    def call(self, way, plan, images):
        """By one of the ways to run: a call, compiled or masked."""
        if way == "call":
            return self.model(self.params, self.gates, images, plan)
        return program(self.model, way)(self.params, self.gates, images, plan)

    def wanted(self, plan, images, *, masked=False):
        with torch.no_grad():
            return self.theirs.masked(images, schedule=plan) if masked else self.theirs(images, schedule=plan)


def gates_of(model):
    """The gates of a PyTorch model that is wrapped."""
    return {after: from_torch(gate) for after, gate in model.gates.items()}


@functools.cache
def gated(kind="timm", capacities=(0.7, 1.0)):
    host, network = {
        "timm": lambda: (models.timm_vit(depth=4, size=networks.SIZE), networks.timm_network(depth=4)),
        "timm, registers": lambda: (
            models.timm_vit(depth=4, size=networks.SIZE, prefix=3),
            networks.timm_network(prefix=3, depth=4),
        ),
        "plain": lambda: (models.plain_host(depth=4), networks.plain_network(depth=4)),
        "placed": lambda: (models.placed(), networks.plain_network(depth=6, placed=True)),
    }[kind]()
    torch.manual_seed(2)
    classes = nn.Linear(network.width, networks.CLASSES)
    declared = schedule.svit(after=AFTER)
    theirs = tet.wrap_gates(host, declared, head=classes, taps=TAPS).eval()
    with torch.no_grad():
        for gate in theirs.gates.values():
            gate[-1].weight.mul_(8)
            gate[-1].bias.zero_()
    params = from_torch(theirs.model) | {f"classes.{name}": value for name, value in from_torch(classes).items()}
    model = tej.wrap_gates(network, declared, head=head, taps=TAPS, capacities=capacities)
    return Gated(theirs, model, params, gates_of(theirs))
