"""Is it worth it for a model? What plans save and change, beside the network cut short and smaller images.

An adapter runs the model (`assess` in each); the contenders, the order in which they are tried, the verdict, the plot
and the page are here.
"""

from tokenexit.assessment.contenders import By, Planned, exit_blocks, plans_to_try
from tokenexit.assessment.results import KINDS, OURS, Assessment, Kind, Measured, Option, options_from, retuned
from tokenexit.assessment.run import Clock, Contender, Found, Ran, run_contenders, worth_timing

__all__ = [
    "KINDS",
    "OURS",
    "Assessment",
    "By",
    "Clock",
    "Contender",
    "Found",
    "Kind",
    "Measured",
    "Option",
    "Planned",
    "Ran",
    "exit_blocks",
    "options_from",
    "plans_to_try",
    "retuned",
    "run_contenders",
    "worth_timing",
]
