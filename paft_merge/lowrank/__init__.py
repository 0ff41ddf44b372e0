"""Low-rank approximations of deltas, in NumPy.

| module | contents |
|---|---|
| factors | sums of products of factors, and their best approximations of lower rank |
| range_finder | the same for a dense matrix that is read in passes |
"""
