"""The output folder: shards, direct I/O, journal, manifest and model card."""
