"""`python -m paft_merge.loops`: compile every loop now, once, instead of when a merge first wants it."""

from paft_merge.loops import prepare

prepare()
