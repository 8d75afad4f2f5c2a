"""The commands that read or write files without training: merge, prepare, index, report, watch, export, replay."""

from pathlib import Path
from typing import Annotated

import typer

from mmopd.commands.options import console
from mmopd.errors import UserError


def merge(
    base: Annotated[
        Path, typer.Argument(help="HF folder of the model that the teachers were trained from.", show_default=False)
    ],
    teachers: Annotated[
        list[str], typer.Argument(metavar="FOLDER[=WEIGHT]...", help="HF folders of the teachers.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The HF folder to write.", show_default=False)],
    alpha: Annotated[
        float, typer.Option(help="Step length: 1 gives the mean of the teachers, more extrapolates past it (ExPO).")
    ] = 1.25,
) -> None:
    """Merge TEACHERS and extrapolate from BASE, without training (ExPO, a baseline); one tensor in memory at a time."""
    from mmopd.commands.merge import merge as extrapolate
    from mmopd.commands.merge import parse_teacher
    from mmopd.runtime.progress import Stages

    with Stages(console) as stages, stages.stage("merge") as stage:
        extrapolate(base, dict(map(parse_teacher, teachers)), alpha, out, stage)
        stage.outcome = str(out)


def prepare(
    converter: Annotated[
        Path, typer.Argument(help="A converter of data/, such as data/deepmath.py.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The folder of shards to write.", show_default=False)],
    *,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the converter, such as data=FILE; may be repeated."
        ),
    ] = None,
    processor: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the student: count the tokens of each row with its tokenizer.", show_default=False
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes. [default: the cores of this machine]", show_default=False),
    ] = None,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of bad examples, which are left out and counted.")
    ] = 0.01,
    preview: Annotated[
        bool, typer.Option("--preview", help="Write only a page of the first three rows, OUT.preview.html.")
    ] = False,
) -> None:
    """Write public or own data as shards with a converter; a stopped call continues where it was.

    The first three rows are shown as they will be asked. The docstring of a converter says what it reads and which
    settings it has.
    """
    import os

    from mmopd import catalog
    from mmopd.prompts.prepare import first_rows
    from mmopd.prompts.prepare import prepare as write
    from mmopd.prompts.row_view import asked, prepared
    from mmopd.prompts.writer import check_free
    from mmopd.runtime.progress import Stages

    cores = workers or len(os.sched_getaffinity(0))
    _check_processor(processor)
    try:
        if preview:
            _preview(catalog.find(converter), settings or [], out, processor)
            return
        check_free(out)
        console.print(asked(first_rows(catalog.find(converter), settings or (), processor=processor)[0]))
        with Stages(console) as stages, stages.stage(f"prepare {out}") as stage:
            shards, count = write(
                catalog.find(converter),
                out,
                settings or (),
                processor=processor,
                workers=cores,
                max_bad=max_bad,
                stage=stage,
            )
            stage.outcome = f"{count.shards} shards"
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues after the last finished shard")
        raise typer.Exit(130) from None
    console.print(prepared(shards, count))


def _check_processor(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise UserError(f"--processor {folder}: no such folder; it needs the tokenizer of the student")


def _preview(converter: Path, settings: list[str], out: Path, processor: Path | None) -> None:
    """Show the first rows of a source, and write them as a page."""
    from mmopd.prompts.prepare import check, first_rows
    from mmopd.prompts.row_view import asked, left_out, outcome
    from mmopd.report.preview import write_preview

    rows, count = first_rows(converter, settings, processor=processor)
    check(count, 1.0, out)
    page = out.with_name(f"{out.name}.preview.html")
    write_preview(page, str(out), " ".join([converter.name, *settings]), rows, count)
    console.print(asked(rows), *left_out(count), sep="\n")
    console.print(f"{outcome(count)}; only {page} is written", markup=False, highlight=False, soft_wrap=True)


def index(
    folder: Annotated[Path, typer.Argument(help="A folder of WebDataset tars.", show_default=False)],
    processor: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the student: count the tokens of each row with its tokenizer.", show_default=False
        ),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image, so that a damaged one is found now.")
    ] = False,
) -> None:
    """Rewrite the index of every tar of FOLDER: for tars from another tool, or to count tokens for another student."""
    from mmopd.prompts import TokenCounter, index_tar
    from mmopd.runtime.progress import Stages

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: no .tar in this folder")
    _check_processor(processor)
    counter = TokenCounter(processor) if processor else None
    with Stages(console) as stages, stages.stage(f"index {folder}") as stage:
        stage.total(len(tars))
        for tar in tars:
            index_tar(tar, counter, decode=decode)
            stage.advance()


def report(run: Annotated[Path, typer.Argument(help="A run folder, finished or not.", show_default=False)]) -> None:
    """Write RUN/report.html from what the run has recorded so far."""
    from mmopd.report.html import write_report

    console.print(f"report: {write_report(run)}", markup=False, highlight=False, soft_wrap=True)


def watch(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, in progress or finished; several are drawn together.",
            show_default=False,
        ),
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1, such as one that ssh forwards; 0: a free one.")
    ] = 0,
) -> None:
    """Show RUN as a live page on this machine: curves, newest responses, processes, faults, logs."""
    from mmopd.commands.watch import watch as serve

    try:
        serve(runs, port, console)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C and stop signals are how it ends
        console.print("stopped")


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=1, help="Step of the checkpoint. [default: the newest]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The HF folder to write. [default: RUN/export-STEP]", show_default=False)
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of processes. [default: as many as trained]", show_default=False)
    ] = None,
) -> None:
    """Write the student of a checkpoint of RUN as a HF folder that transformers and vLLM load.

    RUN/export holds the student of the last step already.
    """
    from mmopd.commands.export import export_checkpoint
    from mmopd.runtime.progress import Stages
    from mmopd.runtime.run_folder import RunFolder

    with Stages(console) as stages:
        export_checkpoint(RunFolder(run), step, out, stages, ranks)


def replay(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    step: Annotated[int, typer.Argument(min=0, help="The step whose update was skipped.", show_default=False)],
) -> None:
    """Compute a skipped update of RUN again, one response at a time, and show what is not finite."""
    from mmopd.commands.replay import replay as compute
    from mmopd.runtime.run_folder import RunFolder

    compute(RunFolder(run), step, console)
