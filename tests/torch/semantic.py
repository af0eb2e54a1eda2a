"""Plans of semantic tokens, and layers on them with weights that change tokens a lot."""

import torch

import tokenexit_torch as tet
from tokenexit.semantic import SemanticPlan, stvit, stvit_r, stvit_r_dense

WIDTH, HEADS = 8, 2
PLANS = {
    "classification": SemanticPlan((3, 3), (2, 2), (4, 4)),
    "dense": SemanticPlan((3, 3), (2, 2), (6, 6), (9, 9), (6, 6), "beyond", residual=True, own_keys=False),
    "whole map": stvit((2, 3)),
    "means": SemanticPlan((3, 4), (2, 3), (5, 6), pool="mean", residual=True, layer_scale=None),
    "learned": SemanticPlan((3, 3), (2, 2), (4, 4), learned=(3, 4)),
    "around, own keys": SemanticPlan((4, 2), (2, 1), (4, 4), (6, 4), (4, 3), "inside"),
}

# Million parameters, and multiply-adds in G.
PUBLISHED = {tet.models.swin_small: (49.6255, 5.826), tet.models.swin_base: (87.81, 10.264)}
SWINS = {"classification": stvit_r(), "dense": stvit_r_dense(), "Swin": None}


def unit(plan, **options) -> tet.semantic.SemanticUnit:
    torch.manual_seed(5)
    made = tet.semantic.SemanticUnit(plan, width=WIDTH, heads=HEADS, **options)
    return lively(made).eval()


def lively(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "scale" in name:
                parameter.copy_(torch.rand_like(parameter))
            elif parameter.ndim >= 2:
                parameter.mul_(15)
    return module


def drawn(size, seed=0, share=0.7):
    random = torch.Generator().manual_seed(seed)
    map = torch.randn(2, *size, WIDTH, generator=random)
    return map, torch.rand(2, *size, generator=random) < share
