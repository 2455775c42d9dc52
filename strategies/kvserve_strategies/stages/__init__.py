"""One module for each stage; importing this package registers them all."""

from kvserve_strategies.stages.centre import Centre
from kvserve_strategies.stages.channel import ChannelMinMax
from kvserve_strategies.stages.exponent import ExponentCode
from kvserve_strategies.stages.fp8 import Fp8
from kvserve_strategies.stages.lead import Lead
from kvserve_strategies.stages.pack import Pack
from kvserve_strategies.stages.rans import Rans
from kvserve_strategies.stages.raw import Raw
from kvserve_strategies.stages.scale import Scale
from kvserve_strategies.stages.step import ConstantStep
from kvserve_strategies.stages.token import TokenMinMax

__all__ = [
    "Centre",
    "ChannelMinMax",
    "ConstantStep",
    "ExponentCode",
    "Fp8",
    "Lead",
    "Pack",
    "Rans",
    "Raw",
    "Scale",
    "TokenMinMax",
]
