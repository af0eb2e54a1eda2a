"""Is it worth it for a model? Contenders of all kinds, run and timed on images of the user's own."""

from tokenexit_torch.assessing.workflow import Assessed, Baseline, assess, speed_up

__all__ = ["Assessed", "Baseline", "assess", "speed_up"]
