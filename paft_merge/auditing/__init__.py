"""The audit: how sparse a delta is, how several will merge, and whether a finished merge is what its manifest says.

`audit` opens the sources (`opening`, `shapes`), surveys every tensor in up to three walks (`walk`, `survey`), and puts
measures (`paft_merge.stats`, `preview`) into one frozen result (`results`), which is read by the advice,
the gate, and everything that draws. `verify` is the other way round: from a finished folder to its manifest.
"""

from __future__ import annotations

from paft_merge.auditing.from_manifest import recorded
from paft_merge.auditing.preview import Proposal
from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.results import Advice, Group, PairAudit, SourceAudit, TensorAudit
from paft_merge.auditing.run import AuditProgress, audit
from paft_merge.output.manifest import ManifestCheck, verify

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
