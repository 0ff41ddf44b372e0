"""Statistics of deltas, for audits on every entry and for every merge while it streams.

| module | contents |
|---|---|
| metrics | counts and sums of one delta, and the metrics computed from them |
| pairs | the same for two deltas |
| spectrum | singular values, subspaces and inner products from low-rank factors |
| sample | the entries of a tensor that a merge examines more closely |
| record | the statistics of a merged tensor as JSON, and the metrics computed from that JSON |
| json_numbers | plain data without NaN and infinities |
"""
