"""The linear transform between cache values and integer levels of decorrelated components."""

from kvserve_kernels.linear.linear_cpu import forward, inverse
from kvserve_kernels.linear.plan import MAX_LEVEL, MAX_SHIFT, MAX_WIDTH, Cells, Group, Plan

__all__ = ["MAX_LEVEL", "MAX_SHIFT", "MAX_WIDTH", "Cells", "Group", "Plan", "forward", "inverse"]
