"""What each reader will do with an adapter: the rules, applied to its headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paft_merge.dialects.held import Held, open_held, unfit
from paft_merge.dialects.rules import READERS, SOURCES, WORST, Outcome
from paft_merge.dialects.traits import TRAITS
from paft_merge.errors import AdapterError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.recipe import did_you_mean


@dataclass(frozen=True)
class Finding:
    """What one reader does because of one trait.

    Attributes:
        trait: a key of `TRAITS`.
        outcome: what that means for the adapter.
        what: the reader's behaviour.
        names: the tensors or modules that have the trait; empty where it is the whole adapter.
        fix: how to get around it.
        source: where the behaviour is documented: file or thread, and its commit, version or date.
    """

    trait: str
    outcome: Outcome
    what: str
    names: tuple[str, ...]
    fix: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What one reader does with an adapter.

    Attributes:
        reader: a key of `READERS`.
        findings: the worst first.
    """

    reader: str
    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst outcome of the findings; `loads` if there are none."""
        return min((finding.outcome for finding in self.findings), key=WORST.index, default="loads")

    @property
    def passes(self) -> bool:
        """Whether the reader loads all of the adapter, perhaps with an option."""
        return self.outcome in ("option", "loads")


def readers_of(listed: str) -> list[str]:
    """The readers in a list with commas, each once; `all` is every reader.

    Raises:
        AdapterError: OPTION, one is not known, or there are none.
    """
    given = [name.strip() for name in listed.split(",") if name.strip()]
    names = list(dict.fromkeys(one for name in given for one in (READERS if name == "all" else [name])))
    for name in names:
        if name not in READERS:
            raise AdapterError.of(
                "OPTION",
                "--for",
                f"{name!r} is not a reader",
                did_you_mean(name, READERS) or f"give some of {', '.join(READERS)}, or all",
            )
    if not names:
        raise AdapterError.of("OPTION", "--for", "names no reader", f"give some of {', '.join(READERS)}, or all")
    return names


def check(
    adapter: Path,
    readers: Sequence[str] = tuple(READERS),
    base: Checkpoint | None = None,
    *,
    lazy_unpickle: bool = False,
) -> list[Verdict]:
    """What each reader will do with an adapter, by the headers of its files; the worst first.

    Args:
        adapter: its folder.
        readers: keys of `READERS`.
        base: its base, open; then shapes, tied embeddings and added tokens are checked, too.
        lazy_unpickle: read `adapter_model.bin` where there is no safetensors file, without running its code.

    Raises:
        AdapterError: it is not an adapter, or its files are malformed.
        CheckpointError: a file of it cannot be read.
    """
    with open_held(adapter, unpickle=lazy_unpickle) as held:
        if base is not None:
            held = replace(held, base=base, unfit=unfit(held, base, lazy_unpickle))
        verdicts = [_judged(held, reader) for reader in readers]
    return sorted(verdicts, key=lambda verdict: WORST.index(verdict.outcome))


def _judged(held: Held, reader: str) -> Verdict:
    found = list[Finding]()
    for rule in READERS[reader][1]:
        trait = TRAITS[rule.trait](held)
        if trait is not None:
            what = rule.what.format(trait.detail)
            found.append(
                Finding(rule.trait, rule.outcome, what, trait.names, rule.fix, " at ".join(SOURCES[rule.source]))
            )
    return Verdict(reader, tuple(sorted(found, key=lambda finding: WORST.index(finding.outcome))))


def to_json(adapter: Path, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The verdicts as JSON: the schema is in docs/serving.md."""
    return {
        "adapter": str(adapter),
        "readers": [
            {
                "reader": verdict.reader,
                "outcome": verdict.outcome,
                "findings": [{**vars(finding), "names": list(finding.names)} for finding in verdict.findings],
            }
            for verdict in verdicts
        ],
    }
