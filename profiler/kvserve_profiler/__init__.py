"""Measures compression strategies on a model: ratio, quality loss and speed; keeps those that no other beats."""
