"""What `paft audit` does with a finished audit: tables or JSON, files, and the gate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paft_merge.auditing.files import csv_text, write
from paft_merge.auditing.results import Audit
from paft_merge.auditing.tables import audit_table, manifest_table
from paft_merge.auditing.verify import ManifestCheck
from paft_merge.errors import AuditError, Problem


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
    if outlets.csv:
        write(outlets.csv, csv_text(audit))
    if outlets.html:
        write(outlets.html, audit.to_html())
    if outlets.plots:
        from paft_merge.auditing.plots import plot

        plot(audit, outlets.plots)
    failed = audit.check(*require)
    if failed:
        raise AuditError(failed)


def report_manifest(check: ManifestCheck, as_json: bool) -> None:
    """Print how a finished merge compares with its manifest.

    Raises:
        AuditError: MANIFEST, with every tensor that is not what the merge wrote.
    """
    if as_json:
        sys.stdout.write(json.dumps(check.to_json(), indent=2) + "\n")
    else:
        manifest_table(check)
    if check.problems:
        raise AuditError(check.problems)
