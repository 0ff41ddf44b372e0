"""`merge()` and `open_plan()`: the streaming merge, intermediate documents, reproduction."""
