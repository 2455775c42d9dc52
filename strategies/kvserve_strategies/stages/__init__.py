"""One module for each stage; importing this package registers them all."""

from kvserve_strategies.stages.absmax import AbsMax
from kvserve_strategies.stages.centre import Centre
from kvserve_strategies.stages.channel import ChannelMinMax
from kvserve_strategies.stages.escape import EscapeCode
from kvserve_strategies.stages.exponent import ExponentCode
from kvserve_strategies.stages.fp8 import Fp8
from kvserve_strategies.stages.grid import Grid
from kvserve_strategies.stages.hadamard import Hadamard
from kvserve_strategies.stages.importance import Importance
from kvserve_strategies.stages.ladder import Ladder
from kvserve_strategies.stages.lead import Lead
from kvserve_strategies.stages.lloyd import LloydMax
from kvserve_strategies.stages.mean import Mean
from kvserve_strategies.stages.metric import Metric
from kvserve_strategies.stages.pack import Pack
from kvserve_strategies.stages.pca import Pca
from kvserve_strategies.stages.predict import PredictLayer
from kvserve_strategies.stages.rans import Rans
from kvserve_strategies.stages.raw import Raw
from kvserve_strategies.stages.recentre import Recentre
from kvserve_strategies.stages.scale import Scale
from kvserve_strategies.stages.step import ConstantStep
from kvserve_strategies.stages.token import TokenMinMax
from kvserve_strategies.stages.unrope import Unrope

__all__ = [
    "AbsMax",
    "Centre",
    "ChannelMinMax",
    "ConstantStep",
    "EscapeCode",
    "ExponentCode",
    "Fp8",
    "Grid",
    "Hadamard",
    "Importance",
    "Ladder",
    "Lead",
    "LloydMax",
    "Mean",
    "Metric",
    "Pack",
    "Pca",
    "PredictLayer",
    "Rans",
    "Raw",
    "Recentre",
    "Scale",
    "TokenMinMax",
    "Unrope",
]
