"""The output of `paft audit`: tables or JSON, files, and the gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paft_merge.auditing.from_manifest import recorded
from paft_merge.auditing.report.audit import Audit
from paft_merge.auditing.report.csv_file import csv_text
from paft_merge.cli.audit_tables import audit_table, in_options, labelled, manifest_table
from paft_merge.cli.terminal import print_document, say, warn
from paft_merge.errors import AuditError
from paft_merge.output.manifest import ManifestCheck
from paft_merge.output.report_files import write_file


@dataclass(frozen=True)
class Outlets:
    """Where an audit is written."""

    as_json: bool = False
    csv: Path | None = None
    html: Path | None = None
    png_dir: Path | None = None


def report(audit: Audit, outlets: Outlets, require: Sequence[str]) -> None:
    """Print and write an audit, then check the requirements.

    Raises:
        AuditError: REQUIRED, with every requirement that fails; GATE, a metric was not measured.
        OutputError: a file cannot be written.
    """
    parts = "where", "what", "fix"
    warn([replace(w, **{p: labelled(getattr(w, p), audit) for p in parts}) for w in audit.warnings])
    if outlets.as_json:
        print_document(in_options(audit.dumps()) + "\n")
    else:
        audit_table(audit, offer_html=outlets.html is None)
    _write_and_check(audit, outlets, require)


def _write_and_check(audit: Audit, outlets: Outlets, require: Sequence[str]) -> None:
    """Write the files that were asked for, say so, and raise the requirements that fail."""
    if outlets.csv:
        write_file(outlets.csv, csv_text(audit))
        say(f"wrote {outlets.csv}")
    if outlets.html:
        write_file(outlets.html, in_options(audit.to_html()))
        say(f"wrote {outlets.html}")
    if outlets.png_dir:
        from paft_merge.auditing.report.png import write_png

        say(f"wrote {len(write_png(audit, outlets.png_dir))} pictures into {outlets.png_dir}")
    failed = audit.check(*require)
    if failed:
        raise AuditError(failed)


def report_manifest(check: ManifestCheck, outlets: Outlets, require: Sequence[str]) -> None:
    """Print how a finished merge compares with its manifest, and the audit in it, then check the requirements.

    Raises:
        AuditError: MANIFEST, with every tensor that differs from what the merge wrote, or the manifest has no audit to
            write or check; REQUIRED and GATE as in `report`.
        OutputError: a file cannot be written.
    """
    audit = recorded(check.manifest)
    if outlets.as_json:
        document = {**check.to_json(), "audit": audit.to_json() if audit else None}
        print_document(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        manifest_table(check, audit, offer_html=outlets.html is None)
    if check.problems:
        raise AuditError(check.problems)
    if audit:
        _write_and_check(audit, outlets, require)
    elif require or outlets != Outlets(outlets.as_json):
        what = "its manifest has no measured deltas: they were merged from values, or by an older version"
        raise AuditError.of("MANIFEST", check.folder, what, "pass base=... to audit the model itself")
