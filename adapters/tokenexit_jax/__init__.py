"""Early exit of tokens on networks of pure functions, in JAX.

import jax, tokenexit_jax as tej
from tokenexit import schedule

model = tej.wrap(network, schedule.neighbours(), classes=19)     # network: a tej.Network of your own functions
heads = model.init(jax.random.key(0))
out = model(params, heads, images)     # out.logits, out.exit_depth, out.tokens_per_block
"""

from tokenexit_jax import exits as exits
from tokenexit_jax import gates as gates
from tokenexit_jax import heads as heads
from tokenexit_jax import models as models
from tokenexit_jax import networks as networks
from tokenexit_jax import semantic as semantic
from tokenexit_jax import training as training
from tokenexit_jax.attention import attend, key_bias
from tokenexit_jax.exits.model import ExitingModel
from tokenexit_jax.exits.outputs import Output
from tokenexit_jax.gates import GatedModel, GatedOutput, gate_thresholds, sampled
from tokenexit_jax.networks.protocol import Block, Embedded, Heads, Network, Params
from tokenexit_jax.pictures import show
from tokenexit_jax.pytrees import register
from tokenexit_jax.saving import load, save
from tokenexit_jax.semantic.model import SemanticModel, SemanticOutput
from tokenexit_jax.training.stages import Stages, distillation, mask_loss, merge, pixel_cross_entropy, split, staged
from tokenexit_jax.wrapping import Capacities, check, wrap, wrap_gates, wrap_semantic

__all__ = [
    "Block",
    "Capacities",
    "Embedded",
    "ExitingModel",
    "GatedModel",
    "GatedOutput",
    "Heads",
    "Network",
    "Output",
    "Params",
    "SemanticModel",
    "SemanticOutput",
    "Stages",
    "attend",
    "check",
    "distillation",
    "gate_thresholds",
    "key_bias",
    "load",
    "mask_loss",
    "merge",
    "pixel_cross_entropy",
    "register",
    "sampled",
    "save",
    "show",
    "split",
    "staged",
    "wrap",
    "wrap_gates",
    "wrap_semantic",
]
