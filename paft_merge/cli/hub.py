"""`paft pull`, `paft push`, `paft card` and `paft reproduce`."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from paft_merge.cli.merging import log_of, noted, progress_bar, warned_and_noted
from paft_merge.cli.terminal import (
    Folder,
    import_option,
    json_option,
    links_option,
    print_json,
    say,
    sigterm_as_interrupt,
    warn,
)


@click.command(short_help="Download the files that a merge reads from the Hub.")
@click.argument("reference", metavar="REF")
@click.option("--lazy-unpickle", is_flag=True, help="Download .bin files too, if a repository has no safetensors.")
@json_option("Print the folders as JSON.")
def pull(reference: str, lazy_unpickle: bool, as_json: bool) -> None:
    """Download the files of REF that a merge reads into the Hub's cache, and print the folder.

    REF is a repository, `user/name` or `user/name@revision`, BASE+ADAPTER for both, or a file, hf://user/name/recipe.yaml.
    Unlike a merge, which uses a complete cached snapshot, this checks whether a branch has moved.
    """
    from paft_merge import hub

    with sigterm_as_interrupt():
        folders = hub.pull(reference, unpickle=lazy_unpickle)
    if as_json:
        print_json({"folders": list(map(str, folders))})
        return
    for folder in folders:
        say(folder, err=False)


@click.command(short_help="Push a model, an adapter or a report to the Hub.")
@click.argument("folder", type=Folder(file_okay=False))
@click.argument("repo_id")
@click.option(
    "--private/--public", default=None, help="Visibility of a new repository. Default: the account's setting."
)
@click.option("--branch", metavar="NAME", help="Commit to this branch, created if necessary. Default: main.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", metavar="TEXT", help="Commit message.")
@click.option("--tag", "tags", multiple=True, metavar="NAME", help="Tag the commit; may be repeated.")
@json_option("Print the address as JSON.")
def push(
    folder: Path, repo_id: str, private: bool | None, branch: str | None, create_pr: bool, message: str | None,
    tags: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Push FOLDER (a merged model, an adapter, an audit's report) to the Hub as one commit.

    A merge is compared with its manifest first. After an interruption run it again: nothing is uploaded twice.
    """
    from paft_merge import hub

    with sigterm_as_interrupt():
        url = hub.push(folder, repo_id, private=private, branch=branch, create_pr=create_pr, message=message, tags=tags)
    print_json({"url": str(url)}) if as_json else say(url, err=False)


@click.command(short_help="Write the model card of a merge again.")
@click.argument("folder", type=Folder(file_okay=False))
@click.option("--overwrite", is_flag=True, help="Replace an edited card.")
@json_option("Print the path as JSON.")
def card(folder: Path | str, overwrite: bool, as_json: bool) -> None:
    """Write the model card of the merge in FOLDER again, from its manifest.

    Evaluation results in FOLDER (evaluation.json, results*.json) become a table and metadata for the Hub.
    """
    from paft_merge.hub.merged_folders import write_card_at

    warn(write_card_at(folder, overwrite=overwrite))
    place = f"{folder}/README.md"
    print_json({"card": place}) if as_json else say(place, err=False)


@click.command(short_help="Merge again from a manifest and compare the bytes.")
@click.argument("place", metavar="FOLDER_OR_REPO")
@click.argument("out", type=Folder(file_okay=False), required=False)
@json_option("Print the result as JSON.")
@click.option("--threads", type=click.IntRange(1), help="Blocks computed at a time. Changes no bit.")
@click.option("--stream-from-hub", is_flag=True, help="Read inputs over the network without storing them.")
@import_option
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin sources, if the merge did.")
@links_option
@click.option("--trust-remote-code", is_flag=True, help="Copy the base's Python files, if the merge did.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def reproduce(
    ctx: click.Context, place: str, out: Path | str | None, as_json: bool, threads: int | None, stream_from_hub: bool,
    imports: tuple[str, ...], lazy_unpickle: bool, follow_links: bool, trust_remote_code: bool, quiet: bool,
) -> None:  # fmt: skip
    """Repeat the merge that a manifest describes, with sources at the same commits, and compare every byte.

    Without OUT the new merge is removed afterwards. The exit code is 3 if something differs.
    """
    from paft_merge.engine.reproduction import reproduce as again

    with sigterm_as_interrupt(), progress_bar(quiet) as progress, log_of(out) as note:
        done = again(
            place,
            out,
            imports=imports,
            threads=threads,
            stream_from_hub=stream_from_hub,
            progress=noted(progress, note),
            warn=warned_and_noted(note),
            lazy_unpickle=lazy_unpickle,
            follow_links=follow_links,
            trust_remote_code=trust_remote_code,
        )
        note(logging.INFO, f"{done.tensors} tensors, {'identical' if done.identical else 'not identical'}")
    if as_json:
        print_json(done.to_json())
    else:
        for name, (was, now) in sorted(done.versions.items()):
            say(f"{name}: {was} then, {now} now", err=False)
        for name in [*done.differing[:20], *done.files]:
            say(f"differs: {name}", err=False)
        if len(done.differing) > 20:
            click.echo(f"and {len(done.differing) - 20} more")
        verdict = "identical" if done.identical else "NOT identical"
        click.echo(f"{verdict}: {done.tensors - len(done.differing)} of {done.tensors} tensors, {done.nbytes:,} bytes")
    if not done.identical:
        ctx.exit(3)
