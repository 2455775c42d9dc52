"""What share of transfers may be predicted late beyond what an objective allows, because fewer are late. Pure.

Margins take predicted times to be log-normal, transfers to end as they began, and links to go on as they did. Where
the rest of a transfer is chosen again, or what surprises is mostly a link that became faster, far fewer are late than
that says, and quality is given away for nothing. So the percentile that margins are made for follows what really came
late (adaptive conformal inference, Gibbs and Candes 2021).
"""

from typing import Final

from kvserve_api.policy import Objective

GAIN: Final = 0.05
"""Of what a transfer teaches: at an objective of 95 %, one that is late takes back what 49 in time have given."""
AIM: Final = 0.4
"""Of the late transfers that an objective allows, the share that is made use of: it shall be kept in most windows."""


class Leeway:
    """Of one objective.

    Attributes:
        share: Of the transfers; never below 0, for an objective that is missed is held as it was asked for, and never
            more than half of the percentile.
    """

    def __init__(self) -> None:
        self.share = 0.0

    def add(self, objective: Objective, *, late: bool) -> None:
        """Take note of a transfer that kept the objective, or was late."""
        asked = objective.percentile / 100
        step = GAIN * (AIM * (1 - asked) - late)
        self.share = min(asked / 2, max(0.0, self.share + step))
