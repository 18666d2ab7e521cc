"""``aero corpus``: build a corpus of real text, and look at one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from aero.errors import AeroError

if TYPE_CHECKING:
    from aero.train.corpus import Manifest, Source

app = typer.Typer(
    no_args_is_help=True,
    help="Real text to train on: build it from code that is already here, hold whole packages out, keep account of it.",
)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder to write the corpus to; new, empty, or a corpus (with --force).")],
    installed: Annotated[
        bool, typer.Option("--installed", help="Source: the Python code of this environment and its standard library.")
    ] = False,
    path: Annotated[
        Path | None,
        typer.Option(help="Source: text or code files under a folder; its first-level subfolders are the packages."),
    ] = None,
    hf_dataset: Annotated[
        str | None,
        typer.Option(
            help="Source: a dataset in codeparrot's layout, by hub name, local folder or .jsonl/.parquet file; "
            "the columns repo_name and path, where present, name packages and files."
        ),
    ] = None,
    hf_config: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    hf_split: Annotated[str, typer.Option(help="Split of the dataset to read.")] = "train",
    text_field: Annotated[str, typer.Option(help="Column of the dataset that holds the text.")] = "content",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read the dataset row by row instead of fetching it first.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first rows of the dataset; how many.")] = None,
    max_bytes: Annotated[
        int, typer.Option(min=0, help="Cap on the corpus in bytes; 0 takes everything (and holds it in memory).")
    ] = 25_000_000,
    holdout_packages: Annotated[
        float, typer.Option(help="Share of the bytes to hold out as whole packages: text unlike any in training.")
    ] = 0.04,
    holdout_files: Annotated[
        float, typer.Option(help="Share of the other files to hold out: new text from packages seen in training.")
    ] = 0.04,
    min_file_bytes: Annotated[int, typer.Option(min=1, help="Leave out shorter files.")] = 128,
    max_file_bytes: Annotated[int, typer.Option(min=1, help="Leave out longer files.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Another seed samples and holds out other files.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a corpus that is already in the folder.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the manifest to this file.")] = None,
) -> None:
    """Build a corpus from one source: clean it, drop duplicates, sample, and hold text out of training twice over.

    Nothing is fetched with --installed or --path.
    What is sampled and held out depends on hashes of texts and package names and on --seed, never on the order of
    files: the same source gives the same corpus.
    """
    from aero.cli.console import progress_bar
    from aero.files import write_json
    from aero.train.corpus import BuildOptions, Filters, FolderSource, HuggingFaceSource, InstalledSource, build_corpus

    source: Source
    if installed + (path is not None) + (hf_dataset is not None) != 1:
        raise AeroError("A corpus has one source: give either --installed, --path DIR or --hf-dataset NAME.")
    if path is not None:
        source = FolderSource(path)
    elif hf_dataset is not None:
        source = HuggingFaceSource(hf_dataset, hf_config, hf_split, text_field, streaming, limit)
    else:
        source = InstalledSource()
    options = BuildOptions(
        max_bytes=max_bytes or None,
        holdout_packages=holdout_packages,
        holdout_files=holdout_files,
        seed=seed,
        filters=Filters(min_bytes=min_file_bytes, max_bytes=max_file_bytes),
    )
    with progress_bar() as progress:
        manifest = build_corpus(source, out, options, force=force, progress=progress)
    if json_file is not None:
        write_json(json_file, manifest.to_dict())
    _print(manifest, out)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A corpus folder.")],
    check: Annotated[bool, typer.Option("--check", help="Read every text and compare it with the manifest.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the manifest to this file.")] = None,
) -> None:
    """Show what a corpus holds, where it is from and what was left out of it; --check reads all of it again."""
    from aero.files import write_json
    from aero.train.corpus import load_manifest, verify

    manifest = verify(folder) if check else load_manifest(folder)
    if json_file is not None:
        write_json(json_file, manifest.to_dict())
    _print(manifest, folder)
    if check:
        Console().print("Every text is what the manifest says, and no text is in two splits.")


def _print(manifest: Manifest, folder: Path) -> None:
    console = Console()
    table = Table(title=f"Corpus {folder}", title_justify="left")
    table.add_column("split")
    for name in ("documents", "packages", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("SHA-256")
    for split, summary in manifest.splits.items():
        table.add_row(
            split, f"{summary.documents:,}", f"{summary.packages:,}", f"{summary.bytes:,}", summary.sha256[:16]
        )
    console.print(table)
    held = [name for name, splits in manifest.packages.items() if "holdout_packages" in splits]
    console.print(f"Packages held out: {', '.join(held) or 'none'}", highlight=False)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest.left_out.items() if count)
    console.print(f"Left out: {left_out or 'nothing'}", highlight=False)
    console.print(f"Corpus hash {manifest.sha256[:16]}, built {manifest.date}, seed {manifest.options['seed']}")
