"""Low-rank approximations of deltas, in NumPy.

| module | contents |
|---|---|
| factors | sums of products of factors, and their best approximations of lower rank |
| range_finder | the same for a dense matrix that is read in passes |
| core_space | the deltas of adapters as small matrices, between bases that they share |
| knots | the same with a basis on the left only |
| ctm | the same with bases of a given rank |
"""
