"""The GPU kernels of all operations, each with the types and sizes at which its machine code is held to a budget.

Sizes are those of a model with 8 key-value heads of 128 values. A group of the linear transform is the keys and values
of two layers: 4,096 values a token, of which half the components live.
"""

from typing import Final

from kvserve_kernels.absmax import absmax_aot
from kvserve_kernels.escape import escape_aot
from kvserve_kernels.floats import floats_aot
from kvserve_kernels.fp8 import fp8_aot
from kvserve_kernels.hadamard import hadamard_aot
from kvserve_kernels.ladder import ladder_aot
from kvserve_kernels.linear import linear_aot
from kvserve_kernels.lloyd import lloyd_aot
from kvserve_kernels.mean import mean_aot
from kvserve_kernels.minmax import minmax_aot
from kvserve_kernels.pack import pack_aot
from kvserve_kernels.predict import predict_aot
from kvserve_kernels.rans import rans_aot
from kvserve_kernels.rotate import rotate_aot
from kvserve_kernels.scale import scale_aot
from kvserve_kernels.step import step_aot

CASES: Final = (
    *rans_aot.CASES,
    *linear_aot.CASES,
    *rotate_aot.CASES,
    *pack_aot.CASES,
    *minmax_aot.CASES,
    *floats_aot.CASES,
    *escape_aot.CASES,
    *fp8_aot.CASES,
    *hadamard_aot.CASES,
    *absmax_aot.CASES,
    *lloyd_aot.CASES,
    *scale_aot.CASES,
    *step_aot.CASES,
    *mean_aot.CASES,
    *ladder_aot.CASES,
    *predict_aot.CASES,
)
