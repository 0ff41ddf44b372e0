"""The audit: how sparse a delta is, how several will merge, and whether a finished merge still matches its manifest.

`audit` opens the sources (`opening`), measures every tensor in up to three passes (`walk`, `tensor_survey`), previews a
merge (`preview`) and returns frozen results (`results`) with advice, gate and reports (`report`). `recorded` reads the
audit that a merge wrote into its manifest.
"""

from __future__ import annotations

from paft_merge.auditing.from_manifest import recorded
from paft_merge.auditing.preview import Proposal
from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.results import Advice, Group, PairAudit, SourceAudit, TensorAudit
from paft_merge.auditing.run import AuditProgress, audit
from paft_merge.hub.merged_folders import verify_at as verify
from paft_merge.output.manifest import ManifestCheck

__all__ = [
    "Advice",
    "Audit",
    "AuditProgress",
    "Group",
    "ManifestCheck",
    "PairAudit",
    "Proposal",
    "SourceAudit",
    "TensorAudit",
    "audit",
    "recorded",
    "verify",
]  # fmt: skip
