"""Early exit of tokens on networks of pure functions, in JAX.

import jax, tokenexit_jax as tej
from tokenexit import schedule

model = tej.wrap(network, schedule.neighbours(), classes=19)     # network: a tej.Network of your own functions
heads = model.init(jax.random.key(0))
out = model(params, heads, images)     # out.logits, out.exit_depth, out.tokens_per_block
"""

from tokenexit_jax.attention import attend, key_bias
from tokenexit_jax.exits.model import ExitingModel
from tokenexit_jax.exits.outputs import GatedOutput, Output
from tokenexit_jax.gates import Drawing, GatedModel, gate_thresholds, sampled
from tokenexit_jax.heads.masks import MaskMaps, Masks
from tokenexit_jax.models.swin import Swin, SwinBackbone, SwinBlock, SwinClassifier, SwinMap, swin_base, swin_small
from tokenexit_jax.networks.protocol import Block, Embedded, Heads, Network, Params
from tokenexit_jax.pytrees import register
from tokenexit_jax.saving import load, save
from tokenexit_jax.semantic.layers import CrossBlock, Recovery, Semantic, SemanticMixing, SemanticTokens, SemanticUnit
from tokenexit_jax.semantic.model import Adopted, SemanticModel, SemanticOutput
from tokenexit_jax.training.staged import Stages, distillation, mask_loss, merge, pixel_cross_entropy, split, staged
from tokenexit_jax.wrapping import Capacities, check, wrap, wrap_gates, wrap_semantic

__all__ = [
    "Adopted",
    "Block",
    "Capacities",
    "CrossBlock",
    "Drawing",
    "Embedded",
    "ExitingModel",
    "GatedModel",
    "GatedOutput",
    "Heads",
    "MaskMaps",
    "Masks",
    "Network",
    "Output",
    "Params",
    "Recovery",
    "Semantic",
    "SemanticMixing",
    "SemanticModel",
    "SemanticOutput",
    "SemanticTokens",
    "SemanticUnit",
    "Stages",
    "Swin",
    "SwinBackbone",
    "SwinBlock",
    "SwinClassifier",
    "SwinMap",
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
    "split",
    "staged",
    "swin_base",
    "swin_small",
    "wrap",
    "wrap_gates",
    "wrap_semantic",
]
