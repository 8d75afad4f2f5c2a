"""The commands that read or write files without training: merge, prepare, index, report, export and replay."""

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
) -> None:
    """Write public or own data as shards with a converter; a stopped call continues where it was.

    The docstring of a converter says what it reads and which settings it has.
    """
    import os

    from mmopd import catalog
    from mmopd.prompts.mixture_view import prepared
    from mmopd.prompts.prepare import prepare as write
    from mmopd.runtime.progress import Stages

    cores = workers or len(os.sched_getaffinity(0))
    try:
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

    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: no .tar in this folder")
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
