"""`Audit`: the whole result of an audit, with its advice, gate and report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from paft_merge.auditing.preview import Preview
from paft_merge.auditing.report.advice import advise
from paft_merge.auditing.report.figures import exponent
from paft_merge.auditing.report.gate import failures
from paft_merge.auditing.report.html import SIGNS, fragment, page, percent, short
from paft_merge.auditing.results import SCHEMA, Advice, AuditData, by_layer
from paft_merge.errors import Problem, escape
from paft_merge.inputs.source_labels import label_of


class Audit(AuditData):
    """The result of an audit. `print` shows it in a few lines, a notebook as a short HTML report."""

    @cached_property
    def advice(self) -> tuple[Advice, ...]:
        """What the numbers mean, in plain words."""
        return advise(self)

    def check(self, *requirements: str) -> list[Problem]:
        """The requirements (`"sparsity(1e-5) >= 0.9"`, see `gate`) that do not hold; empty when all hold.

        Raises:
            AuditError: GATE, a requirement cannot be read, or its metric was not measured.
        """
        return failures(self, requirements)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON (schema `SCHEMA`, described in docs/audit.md); undefined values are null."""
        document: dict[str, Any] = _defined({
            "schema": SCHEMA,
            "base": self.base,
            "epsilon": self.epsilon,
            "overlap_density": self.density,
            "sampled": self.sampled,
            "sources": [s.to_json() for s in self.sources],
            "pairs": [p.to_json() for p in self.pairs],
            "preview": _preview_json(self.preview, [s.label for s in self.sources]) if self.preview else None,
            "advice": [dict(vars(a)) for a in self.advice],
            "skipped": [{"source": s.source, "names": list(s.names), "why": s.why} for s in self.skipped],
            "warnings": [str(w) for w in self.warnings],
        })  # fmt: skip
        return document

    def dumps(self) -> str:
        """`to_json` as text."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """The report as one self-contained page."""
        return page(self)

    def _repr_html_(self) -> str:
        return fragment(self)

    def __str__(self) -> str:
        lines = [f"audit of {len(self.sources)} {'source' if len(self.sources) == 1 else 'sources'} {_on(self.base)}"]
        for source in self.sources:
            text = f"  {source.label}: {source.header.kind}, {len(source.tensors):,} tensors"
            if source.tensors:
                shares = f"{percent(source.paft_sparsity(self.epsilon))} below {exponent(self.epsilon)}"
                text += f", {shares}, norm {short(source.total.measure.norm)}"
            lines.append(text)
        for pair in self.pairs:
            total = pair.total
            numbers = f"norms x {short(total.size_ratio)}, cosine {short(total.cosine)}, signs differ {percent(total.conflict)}"
            lines.append(f"  {pair.left} and {pair.right}: {numbers}")
        lines += [f"  {SIGNS[advice.level][0]} {advice.text}" for advice in self.advice if advice.level == "warn"]
        return escape("\n".join(lines), lines=True)

    def __repr__(self) -> str:
        names = ", ".join(escape(s.label) for s in self.sources)
        return f"<Audit of {names}: {sum(len(s.tensors) for s in self.sources)} tensors>"


def _on(base: str | None) -> str:
    return f"on {label_of(base)}" if base else "without a base"


def _preview_json(preview: Preview, labels: Sequence[str]) -> dict[str, Any]:
    def survived(parts: Iterable[Any]) -> dict[str, Any]:
        held = tuple(parts)
        return {label: preview.of(label, held).to_json() for label in labels if any(label in t.sources for t in held)}

    return {
        "method": preview.method,
        "parameters": dict(preview.parameters),
        "norm_ratio": preview.norm_ratio,
        "all": survived(preview.tensors),
        "layers": {str(k): survived(own) for k, own in by_layer(preview.tensors).items()},
        "tensors": [{"name": t.name, "sources": survived([t])} for t in preview.tensors],
    }


def _defined(value: Any) -> Any:
    """`value` with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _defined(v) for k, v in value.items()}
    return [_defined(v) for v in value] if isinstance(value, (list, tuple)) else value
