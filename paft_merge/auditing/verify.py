"""A finished merge against its own manifest; where both are described is `paft_merge.manifest`."""

from __future__ import annotations

from paft_merge.manifest import ManifestCheck, is_merged, verify

__all__ = ["ManifestCheck", "is_merged", "verify"]
