"""`python -m paft_merge.compute.kernels`: compile every kernel now, instead of at its first call.

With a folder, compile them into it for the level of x86-64 that `NUMBA_CPU_NAME` names, as the build of a wheel does.
"""

import sys
from pathlib import Path

from paft_merge.compute.kernels import prepare, ship

ship(Path(sys.argv[1])) if sys.argv[1:] else prepare()
