"""`python -m paft_merge.compute.kernels`: compile every loop now, once, instead of when a merge first wants it."""

from paft_merge.compute.kernels import prepare

prepare()
