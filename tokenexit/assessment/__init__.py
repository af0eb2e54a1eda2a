"""Is it worth it for a model? What plans save and change beside the network cut short and smaller images, and a verdict.

An adapter runs the model (`assess` in each); the contenders, the order in which they are tried, the verdict, the plot
and the page are here.
"""

from tokenexit.assessment.results import KINDS, OURS, Assessment, Kind, Measured, Option, options_from, retuned

__all__ = ["KINDS", "OURS", "Assessment", "Kind", "Measured", "Option", "options_from", "retuned"]
