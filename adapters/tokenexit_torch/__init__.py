"""Early exit of tokens on PyTorch models.

import timm, tokenexit_torch as tet
from tokenexit import schedule

vit = timm.create_model("vit_base_patch16_224", img_size=512, num_classes=0)
model = tet.wrap(vit, schedule.neighbours(), num_classes=19)
out = model(images)     # out.logits, out.exit_depth, out.tokens_per_block
"""

from tokenexit.windows import Windows
from tokenexit_torch import assessing as assessing
from tokenexit_torch import attention as attention
from tokenexit_torch import exits as exits
from tokenexit_torch import gates as gates
from tokenexit_torch import heads as heads
from tokenexit_torch import hosts as hosts
from tokenexit_torch import inference as inference
from tokenexit_torch import models as models
from tokenexit_torch import semantic as semantic
from tokenexit_torch import training as training
from tokenexit_torch.assessing.workflow import Assessed, assess, speed_up
from tokenexit_torch.calibration.adapted import calibrate, default_settings, drift_sample
from tokenexit_torch.calibration.certificate import fingerprints, load_certificate, save_certificate
from tokenexit_torch.calibration.traces import Trace, trace
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import DecodedOutput, Output
from tokenexit_torch.exits.static import StaticModel, needed_capacity
from tokenexit_torch.gates import GatedModel, GatedOutput, Sampled, gate_thresholds
from tokenexit_torch.heads.masks import MaskHead
from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.protocol import Embedded, Host
from tokenexit_torch.inference.export import export_onnx, export_program
from tokenexit_torch.inference.latency import measure_latency
from tokenexit_torch.inference.predictor import Predictor
from tokenexit_torch.inference.windows import WindowedOutput, sliding
from tokenexit_torch.pictures import show
from tokenexit_torch.saving import load, save
from tokenexit_torch.semantic.model import SemanticModel, SemanticOutput
from tokenexit_torch.training.fitting import fit_exits
from tokenexit_torch.training.merges import fit_merges
from tokenexit_torch.training.stages import Staged, Stages, distillation, mask_loss, pixel_cross_entropy
from tokenexit_torch.wrapping import wrap, wrap_decoder, wrap_gates, wrap_semantic

__all__ = [
    "Assessed",
    "DecodedOutput",
    "DecodingHost",
    "DecodingModel",
    "Embedded",
    "ExitingModel",
    "GatedModel",
    "GatedOutput",
    "Host",
    "MaskHead",
    "Output",
    "Predictor",
    "Sampled",
    "SemanticModel",
    "SemanticOutput",
    "Staged",
    "Stages",
    "StaticModel",
    "Trace",
    "WindowedOutput",
    "Windows",
    "assess",
    "calibrate",
    "default_settings",
    "distillation",
    "drift_sample",
    "export_onnx",
    "export_program",
    "fingerprints",
    "fit_exits",
    "fit_merges",
    "gate_thresholds",
    "load",
    "load_certificate",
    "mask_loss",
    "measure_latency",
    "needed_capacity",
    "pixel_cross_entropy",
    "save",
    "save_certificate",
    "show",
    "sliding",
    "speed_up",
    "trace",
    "wrap",
    "wrap_decoder",
    "wrap_gates",
    "wrap_semantic",
]
