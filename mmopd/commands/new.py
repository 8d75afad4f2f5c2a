"""`mmopd new KIND NAME`: write a small working file with comments into the workspace."""

import keyword
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmopd.commands.options import console
from mmopd.errors import UserError


class Kind(StrEnum):
    """What `mmopd new` can write."""

    TASK = "task"
    TEACHER = "teacher"
    MIXTURE = "mixture"
    RECIPE = "recipe"
    BENCHMARK = "benchmark"
    OBJECTIVE = "objective"


# Kind -> the files, by template in templates/; the first one is the file that other files and commands name.
FILES = {
    Kind.TASK: {"task.py": "modalities/{}.py"},
    Kind.TEACHER: {"teacher.yaml": "teachers/{}.yaml"},
    Kind.MIXTURE: {"mixture.yaml": "data/{}.yaml"},
    Kind.RECIPE: {"recipe.yaml": "recipes/{}.yaml"},
    Kind.BENCHMARK: {
        "suite.yaml": "eval/{}.yaml",
        "benchmark.yaml": "eval/tasks/{}.yaml",
        "benchmark.py": "eval/tasks/{}.py",
    },
    Kind.OBJECTIVE: {"objective.py": "algorithm/{}.py"},
}
NEXT = {
    Kind.TASK: (
        "change `judge`, and test it on answers whose score you know",
        "mmopd prepare data/generic.py shards/{0} --set data=FILE --set task={0}   # its rows",
        "mmopd new mixture {0}   # then name the task there",
    ),
    Kind.TEACHER: (
        "change `model` and the routes",
        "name it in a recipe: fleet: teachers/{0}.yaml",
        "mmopd doctor RECIPE   # serves and examines its teachers",
    ),
    Kind.MIXTURE: (
        "change `task`",
        "mmopd prepare data/generic.py shards/{0} --set data=FILE --set task=TASK   # writes the shards",
        "name it in a recipe: mixture: data/{0}.yaml",
    ),
    Kind.RECIPE: (
        "mmopd train recipes/{0}.yaml   # works as it is, on two cores",
        "replace student, fleet and mixture with your own",
    ),
    Kind.BENCHMARK: (
        "change `data` in eval/{0}.yaml, and the functions in eval/tasks/{0}.py to its columns",
        "mmopd eval eval/{0}.yaml MODEL, or name it in a recipe: suite: eval/{0}.yaml",
    ),
    Kind.OBJECTIVE: (
        "change `targets`",
        "mmopd train RECIPE 'algorithm.objective={{kind: {0}}}'",
    ),
}


def new(
    kind: Annotated[Kind, typer.Argument(help="What to write.", show_default=False)],
    name: Annotated[
        str, typer.Argument(help="Its name: letters, digits and underscores, such as count_dots.", show_default=False)
    ],
) -> None:
    """Write a small working file with comments into the workspace, the current folder; nothing is overwritten.

    - **task**: modalities/NAME.py, the form of a kind of prompts, and the verifier of the answers
    - **teacher**: teachers/NAME.yaml, a fleet of one teacher with its route
    - **mixture**: data/NAME.yaml, folders of shards and how often each is drawn
    - **recipe**: recipes/NAME.yaml, a run
    - **benchmark**: eval/NAME.yaml, a suite of one benchmark, with its task of lmms-eval in eval/tasks/
    - **objective**: algorithm/NAME.py, what the student learns from a step

    Examples: `mmopd new task count_dots`, then `mmopd show modalities/count_dots.py`.
    """
    written = write(kind, name)
    for path in written:
        console.print(f"wrote {path}", markup=False)
    console.print("Next:")
    for step in (*NEXT[kind], "mmopd show {1}   # shows how mmopd reads it"):
        console.print(f"  {step.format(name, written[0])}", markup=False, soft_wrap=True)


def write(kind: Kind, name: str) -> list[Path]:
    """Write the files of a kind into the current folder, and return their paths, the main one first.

    Raises:
        UserError: the name cannot be one, a file exists, mmopd ships something of this name, or a file cannot be
            written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    _check_name(kind, name)
    templates = Environment(
        loader=PackageLoader("mmopd.commands"), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    names = {"name": name, "class": "".join(part[:1].upper() + part[1:] for part in name.split("_"))}
    texts = {
        Path(path.format(name)): templates.get_template(f"{template}.j2").render(names)
        for template, path in FILES[kind].items()
    }
    for path in texts:
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: this file exists already; choose another name, or remove it first")
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return list(texts)


def _check_name(kind: Kind, name: str) -> None:
    from mmopd import workspace
    from mmopd.algorithm.objectives import OBJECTIVES

    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r}: a name has letters, digits and underscores, begins with a letter, and is no word of Python's: "
            "choose a name such as count_dots"
        )
    main = next(iter(FILES[kind].values())).format(name)
    ships = name in OBJECTIVES if kind is Kind.OBJECTIVE else (workspace.shipped() / main).is_file()
    if ships and not Path(main).exists():
        raise UserError(f"{main}: mmopd ships {'an objective' if kind is Kind.OBJECTIVE else 'a file'} of this name, "
                        "which yours would replace; choose another name")  # fmt: skip
