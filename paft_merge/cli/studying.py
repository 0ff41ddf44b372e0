"""`paft study`."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from paft_merge.cli.running import resume_hint, silence_libraries
from paft_merge.cli.terminal import complete_files, json_option, print_json, say, sigterm_as_interrupt


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str | CompletionItem]:
    from paft_merge.studies.study import known_studies

    found: list[str | CompletionItem] = [name for name in known_studies() if name.startswith(incomplete)]
    return found or [*complete_files(ctx, incomplete)]


@click.command(short_help="Test a claim of a paper in small, with seeds and intervals.")
@click.argument("name", metavar="NAME", shell_complete=_complete)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write. Seeds that are finished there are not run again.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the data that the study names; frozen-lake and on-policy need none.",
)
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds. Default: the study's.")
@click.option("--smoke", is_flag=True, help="Run the small form: a check that the study runs, without a finding.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a parameter of the study, e.g. learning_rate=0.003.",
)
@click.option("--quiet", is_flag=True, help="No lines about the seeds.")
@json_option("Print the files and the findings as JSON.")
def study(
    name: str, out: Path, data: Path | None, seeds: int | None, smoke: bool, overrides: tuple[str, ...], quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Run the study NAME (frozen-lake, on-policy, on-policy-lm, paft-small, precision, or the YAML file of one) and print its findings.

    Writes results.json, NAME.md with tables, and plots to the folder of --out. Started again, it continues. A claim holds
    only where the 95 % interval of the difference over seeds excludes zero.
    """
    silence_libraries()
    from paft_merge.studies import run_study

    with resume_hint(), sigterm_as_interrupt():
        found = run_study(
            name, out, data=data, seeds=seeds, smoke=smoke, overrides=overrides,
            progress=(lambda line: None) if quiet else say,
        )  # fmt: skip
    if not quiet:
        for head, *verdicts in found.claims:
            say(head.replace("**", ""))
            for verdict in verdicts:
                say(f"  {verdict.replace('**', '')}")
    if as_json:
        claims = [{"claim": head, "findings": findings} for head, *findings in found.claims]
        print_json({"page": str(found.page), "results": str(found.results), "seeds_run": found.ran, "claims": claims})
    else:
        say(found.page, err=False)
