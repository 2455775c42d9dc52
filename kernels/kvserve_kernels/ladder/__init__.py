"""A fixed family of tables for zero-mean levels, the choice of one for each channel, and coding with them."""

from kvserve_kernels.ladder.ladder_cpu import choose, encode, live
from kvserve_kernels.ladder.tables import tables

__all__ = ["choose", "encode", "live", "tables"]
