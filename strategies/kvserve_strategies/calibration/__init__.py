"""Calibration: what a model's texts teach a codec about its KV cache, measured once for each model."""
