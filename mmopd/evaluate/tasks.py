"""Task files of lmms-eval: where they are, what they consist of, and how they get local data and a family's prompts."""

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import mmopd
from mmopd import plain_yaml
from mmopd.config.suite import LmmsBenchmark, PromptVariant
from mmopd.errors import ConfigError, DataError, UserError
from mmopd.runtime.fingerprint import hash_files
from mmopd.settings_errors import described, shortened
from mmopd.settings_file import text_of

# Parts of a task file with a setting for each of several models, and one called `default`.
BY_MODEL = ("lmms_eval_specific_kwargs", "model_specific_target_kwargs", "model_specific_generation_kwargs")
# Columns without which a built-in task gives a score all the same, besides the one that its `doc_to_target` names.
SILENT = {
    "visulogic": ("image_path", "question", "label"),
    "mmstar": ("A", "B", "C", "D"),
    "mmstar_oc": ("A", "B", "C", "D"),
}
NAME = re.compile(r"^task:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Task:
    """A task in the form in which lmms-eval gets it."""

    name: str  # for --tasks, and the key in the results
    folder: Path | None  # for --include_path; None for a built-in task with its own data
    rows: int | None  # rows of the local data, if each of them is asked
    code: str  # hash of the task's files; empty for a built-in task, which changes only with lmms-eval
    data: str  # hash of the local data, or empty
    variant: PromptVariant  # whose prompts it has


class _Loader(plain_yaml.Loader):
    """Reads task files without importing the functions named in them."""

    tags = plain_yaml.PLAIN | {"!function"}


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def prepare(benchmark: LmmsBenchmark, folder: Path, variant: PromptVariant = "default") -> Task:
    """Write what lmms-eval needs to find the task of a benchmark into `folder`, which is created.

    A task with local data, one that has the variant, or one that is not built in, becomes a file that includes the
    original by its absolute path. It gets another name, since lmms-eval prefers a built-in task to another task of the
    same name. The variant becomes its `default`: lmms-eval itself chooses by the name of its client, `openai`.

    Args:
        benchmark: the row of a suite.
        folder: where the file is written.
        variant: whose prompts are wanted; a task that has none of them keeps its `default`.

    Raises:
        ConfigError: the task does not exist.
        DataError: its data is missing, not a parquet file, or lacks a column.
    """
    own = benchmark.task.endswith((".yaml", ".yml"))
    source = Path(benchmark.task).absolute() if own else builtin(benchmark.task)
    settings = read_task(source)
    chosen = {part: {"default": of[variant]} for part in BY_MODEL if variant in (of := settings.get(part) or {})}
    used: PromptVariant = variant if chosen else "default"
    if not own and benchmark.data is None and used == "default":
        return Task(benchmark.task, None, None, "", "", used)
    name = f"mmopd_{settings.get('task', source.stem)}"
    generated: dict[str, Any] = {"include": str(source), "task": name, **chosen}
    rows = None
    if benchmark.data is not None:
        split = settings.get("test_split") or settings.get("validation_split") or "test"
        generated |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(benchmark.data.absolute())}},
        }
        rows = None if settings.get("process_docs") else _count_rows(benchmark.data, benchmark.task, settings)
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(generated, sort_keys=False), encoding="utf-8")
    code = hash_files(_sources(source)) if own else ""
    return Task(name, folder, rows, code, hash_files([benchmark.data]) if benchmark.data else "", used)


def read_task(path: Path, by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a task file and of the files it includes; functions stay names.

    Args:
        path: the file.
        by: the files that include it, one by the other.

    Raises:
        ConfigError: the file, or one that it includes, is missing or not a YAML mapping, or it includes itself.
    """
    included_by = f"; {by[-1]} includes it" if by else ""
    shown = shortened(str(path))
    if path in by:
        raise ConfigError(f"{shown}: this task file includes itself{included_by}: remove one `include`")
    try:
        settings = plain_yaml.parse(text_of(path), _Loader, lenient=True)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such task file{included_by}") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}{included_by}") from None
    except plain_yaml.YamlError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected the keys of an lmms-eval task, found {described(settings)}{included_by}")
    included = settings.pop("include", None) or []
    others = [included] if isinstance(included, str) else included
    if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
        raise ConfigError(f"{path}: include: expected a path or a list of paths, found {described(included)}")
    merged: dict[str, Any] = {}
    for other in reversed(others):
        merged |= read_task(path.parent / other, (*by, path))
    return merged | settings


def builtin(name: str) -> Path:
    """Return the file of a task that lmms-eval ships.

    Raises:
        UserError: lmms-eval is not installed.
        ConfigError: it ships no such task.
    """
    found = _builtins().get(name)
    if found is None:
        raise ConfigError(
            f"lmms-eval has no task {name!r}; `python -m lmms_eval tasks list` lists them (a group of tasks is none); "
            "name your own task by its .yaml file"
        )
    return found


@functools.cache
def _builtins() -> dict[str, Path]:
    """Return the files of all tasks that lmms-eval ships, by name; reads two thousand files once."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("lmms-eval is not installed; `pip install 'mmopd[eval]'` installs it")
    here = Path(spec.submodule_search_locations[0]) / "tasks"
    files = sorted(here.rglob("*.yaml"), reverse=True)  # of two with the same name, the first is kept
    texts = ((path, path.read_text(encoding="utf-8", errors="replace")) for path in files)
    return {found[1]: path for path, text in texts if (found := NAME.search(text))}


def _count_rows(data: Path, task: str, settings: dict[str, Any]) -> int:
    """Count the rows of a parquet file, after checking that it has the columns that lmms-eval would not miss.

    Raises:
        DataError: the file is missing, is not a complete parquet file, or lacks a column.
    """
    import pyarrow.parquet as pq  # a page about a run needs no table

    try:
        found = pq.read_metadata(data)
    except FileNotFoundError:
        raise DataError(f"{data}: no such file; it is the `data` of a benchmark") from None
    except Exception as error:
        raise DataError(f"{data}: not a complete parquet file: {error}") from error
    columns = found.schema.to_arrow_schema().names
    target = settings.get("doc_to_target")
    needed = [*SILENT.get(task, ()), *([target] if isinstance(target, str) and target.isidentifier() else [])]
    if missing := [name for name in needed if name not in columns]:
        raise DataError(
            f"{data}: no column {missing[0]!r}, which the task {shortened(task)} reads; lmms-eval would give a score "
            f"without it. The file has: {', '.join(columns)}"
        )
    return int(found.num_rows)


def _sources(task: Path) -> list[Path]:
    """List all files that an own task may depend on: the files in its folder, and mmopd's verifiers."""
    verifiers = Path(mmopd.__path__[0]) / "task"
    return [
        *sorted(p for p in task.parent.iterdir() if p.suffix in {".yaml", ".yml", ".py"}),
        *sorted(verifiers.glob("*.py")),
    ]
