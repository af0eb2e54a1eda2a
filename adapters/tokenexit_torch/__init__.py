"""Early exit of tokens on PyTorch models.

import timm, tokenexit_torch as tet
from tokenexit import schedule

vit = timm.create_model("vit_base_patch16_224", img_size=512, num_classes=0)
model = tet.wrap(vit, schedule.neighbours(), num_classes=19)
out = model(images)     # out.logits, out.exit_depth, out.tokens_per_block
"""

from tokenexit_torch.attention import attending_per_image
from tokenexit_torch.calibration.calibrate import calibrate, default_settings, drift_sample
from tokenexit_torch.calibration.certificate import fingerprints, load_certificate, save_certificate
from tokenexit_torch.calibration.trace import Trace, trace
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import DecodedOutput, Output
from tokenexit_torch.exits.static import StaticModel, needed_capacity
from tokenexit_torch.gates import Drawing, GatedModel, GatedOutput, Sampled, gate_thresholds
from tokenexit_torch.heads.masks import AttentionToMask, MaskHead, MaskMaps, Masks
from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.eomt_dpt import TransformersDPT, TransformersEoMT
from tokenexit_torch.hosts.protocol import Embedded, Host
from tokenexit_torch.hosts.timm import TimmEva, TimmViT
from tokenexit_torch.hosts.torchvision import TorchvisionViT
from tokenexit_torch.hosts.transformers import TransformersViT
from tokenexit_torch.inference.export import EXPORTED, export_onnx, export_program
from tokenexit_torch.inference.predictor import Predictor
from tokenexit_torch.inference.windows import WindowedOutput, Windows, sliding
from tokenexit_torch.models.swin import Swin, SwinBackbone, SwinBlock, SwinClassifier, SwinMap, swin_base, swin_small
from tokenexit_torch.saving import load, save
from tokenexit_torch.semantic.layers import CrossBlock, Recovery, Semantic, SemanticMixing, SemanticTokens, SemanticUnit
from tokenexit_torch.semantic.model import SemanticModel, SemanticOutput
from tokenexit_torch.training.fitting import FitReport, HeldOut, fit_exits
from tokenexit_torch.training.staged import Staged, Stages, distillation, mask_loss, pixel_cross_entropy
from tokenexit_torch.wrapping import wrap, wrap_decoder, wrap_gates, wrap_semantic

__all__ = [
    "AttentionToMask",
    "CrossBlock",
    "DecodedOutput",
    "DecodingHost",
    "DecodingModel",
    "Drawing",
    "EXPORTED",
    "Embedded",
    "ExitingModel",
    "FitReport",
    "GatedModel",
    "GatedOutput",
    "HeldOut",
    "Host",
    "MaskHead",
    "MaskMaps",
    "Masks",
    "Output",
    "Predictor",
    "Recovery",
    "Sampled",
    "Semantic",
    "SemanticMixing",
    "SemanticModel",
    "SemanticOutput",
    "SemanticTokens",
    "SemanticUnit",
    "Staged",
    "Stages",
    "StaticModel",
    "Swin",
    "SwinBackbone",
    "SwinBlock",
    "SwinClassifier",
    "SwinMap",
    "TimmEva",
    "TimmViT",
    "TorchvisionViT",
    "Trace",
    "TransformersDPT",
    "TransformersEoMT",
    "TransformersViT",
    "WindowedOutput",
    "Windows",
    "attending_per_image",
    "calibrate",
    "default_settings",
    "distillation",
    "drift_sample",
    "export_onnx",
    "export_program",
    "fingerprints",
    "fit_exits",
    "gate_thresholds",
    "load",
    "load_certificate",
    "mask_loss",
    "needed_capacity",
    "pixel_cross_entropy",
    "save",
    "save_certificate",
    "sliding",
    "swin_base",
    "swin_small",
    "trace",
    "wrap",
    "wrap_decoder",
    "wrap_gates",
    "wrap_semantic",
]
