"""Linear prediction of the channels of a layer from a few channels of the layer before."""

from kvserve_kernels.predict.predict_cpu import MAX_SOURCES, apply, fit

__all__ = ["MAX_SOURCES", "apply", "fit"]
