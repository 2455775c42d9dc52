"""Build the C library beside its sources: ``python -m kvserve_kernels.native``."""

import sys

from kvserve_kernels.native.build import BuildError, build

try:
    print(f"kvserve: native kernels in {build().name}")
except BuildError as error:
    # no compiler is no failure
    print(f"kvserve: no native kernels, numba does their work: {error}", file=sys.stderr)
