"""What deltas are measured by: an audit on every entry, and every merge as it streams.

| room | what it is |
|---|---|
| metrics | what is counted of one delta, and the metrics that follow |
| pairs | the same of two |
| spectrum | what factors tell without their product |
| sample | the entries that a merge looks at more closely |
| record | what a merge notes of a tensor, and measures again from those notes |
"""
