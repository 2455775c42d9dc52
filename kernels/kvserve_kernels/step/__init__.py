"""Centring and constant-step quantisation."""

from kvserve_kernels.step.step_cpu import (
    LARGEST_CODE,
    centre,
    dequantise,
    quantise,
    relative_steps,
    uncentre,
)

__all__ = ["LARGEST_CODE", "centre", "dequantise", "quantise", "relative_steps", "uncentre"]
