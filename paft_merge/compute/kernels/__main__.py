"""`python -m paft_merge.compute.kernels`: compile every kernel now, instead of at its first call."""

from paft_merge.compute.kernels import prepare

prepare()
