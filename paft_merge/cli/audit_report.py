"""What `paft audit` does with a finished audit: tables or JSON, files, and the gate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paft_merge.auditing.from_manifest import recorded
from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.report.csv_file import csv_text, write
from paft_merge.cli.audit_tables import audit_table, manifest_table
from paft_merge.errors import AuditError, Problem
from paft_merge.output.manifest import ManifestCheck


@dataclass(frozen=True)
class Outlets:
    """Where an audit goes."""

    as_json: bool = False
    csv: Path | None = None
    html: Path | None = None
    plots: Path | None = None


def report(audit: Audit, outlets: Outlets, require: Sequence[str], warn: Callable[[Sequence[Problem]], None]) -> None:
    """Print and write an audit, then hold it against the requirements.

    Raises:
        AuditError: REQUIRED, with everything that fails; GATE, a requirement asks for what is not there.
        OutputError: a file cannot be written.
    """
    warn(audit.warnings)
    if outlets.as_json:
        sys.stdout.write(audit.dumps() + "\n")
    else:
        audit_table(audit)
    _elsewhere(audit, outlets, require)


def _elsewhere(audit: Audit, outlets: Outlets, require: Sequence[str]) -> None:
    """Write the files that are wanted, and raise what is required and fails."""
    if outlets.csv:
        write(outlets.csv, csv_text(audit))
    if outlets.html:
        write(outlets.html, audit.to_html())
    if outlets.plots:
        from paft_merge.auditing.report.png import plot

        plot(audit, outlets.plots)
    failed = audit.check(*require)
    if failed:
        raise AuditError(failed)


def report_manifest(check: ManifestCheck, outlets: Outlets, require: Sequence[str]) -> None:
    """Print how a finished merge compares with its manifest, and what that says of its sources, then hold it against `require`.

    Raises:
        AuditError: MANIFEST, with every tensor that is not what the merge wrote, or nothing is recorded that was asked
            for; REQUIRED and GATE as in `report`.
        OutputError: a file cannot be written.
    """
    audit = recorded(check.manifest)
    if outlets.as_json:
        document = {**check.to_json(), "audit": audit.to_json() if audit else None}
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        manifest_table(check, audit)
    if check.problems:
        raise AuditError(check.problems)
    if audit:
        _elsewhere(audit, outlets, require)
    elif require or outlets != Outlets(outlets.as_json):
        what = "its manifest has no measured deltas: they were merged from values, or by an older version"
        raise AuditError.of("MANIFEST", check.folder, what, "pass --base to audit the model itself")
