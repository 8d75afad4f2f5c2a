"""Model card: the README.md of a distilled model, which says how the model was made and how to repeat it."""

from datetime import UTC, datetime

import yaml

from mmopd import catalog, settings_file
from mmopd.algorithm.base import Objective
from mmopd.config import Fleet, Mixture
from mmopd.evaluate import Results
from mmopd.report.metrics import METRICS, documented, read_lines
from mmopd.runtime.run_folder import RunFolder
from mmopd.teacher import identity
from mmopd.teacher.router import load_teachers, references, routed

CARD = "README.md"
# Metrics of the card.
SHOWN = (
    "loss",
    "reverse_kl",
    "return",
    "correct/sampled",
    "accuracy/*",
    "response_length",
    "skipped_updates",
)
LAST = 10  # number of last steps over which their mean is taken


def model_card(run: RunFolder, step: int | None = None) -> str:
    """Return the card of a run's export in Markdown, with the front matter of model hubs, and with scores if there are
    any.

    Args:
        run: the run folder.
        step: number of training steps of the model; None for the final model, which is the one that is evaluated.
    """
    recipe = run.recipe()
    objective = recipe.algorithm.objective
    train = recipe.train
    steps = read_lines(run.metrics)[:step]
    done = f"{steps[-1]['step'] + 1} of {train.steps} steps" if steps else f"{train.steps} steps"
    batch = f"{recipe.rollout.prompts} prompts x {recipe.rollout.group} responses a step"
    front = yaml.safe_dump(
        {"base_model": str(recipe.student.model), "library_name": "transformers", "tags": ["distillation", "mmopd"]}
    )
    parts = [
        f"---\n{front}---",
        f"# {run.root.resolve().name}",
        f"Distilled from `{recipe.student.model}` by mmopd on {datetime.now(UTC):%Y-%m-%d}, with the objective "
        f"`{objective.kind}`: "
        f"{done}, {batch}, {train.dtype}, learning rate {train.lr:g}, seed {recipe.seed}.",
        _teachers(load_teachers(recipe.fleet, objective), objective),
        _changes(run, step),
        _sources(catalog.load_mixture(recipe.mixture, key="mixture")),
        _scores(run) if step is None else "",
        _metrics(steps),
        "## Versions\n\n" + "\n".join(f"- {name} {version}" for name, version in run.known_versions().items()),
        f"## Recipe\n\n```yaml\n{settings_file.dump(recipe)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _teachers(fleet: Fleet, objective: Objective) -> str:
    before = references(fleet, objective)
    routes = {
        name: [f"{route.task}/{route.modality}" for route in fleet.routes if name in route.teachers]
        for name in fleet.teachers
    }
    lines = []
    for name, teacher in {**routed(fleet).teachers, **(before.teachers if before else {})}.items():
        what = f"`{teacher.model}`" if teacher.model else f"served elsewhere ({len(teacher.endpoints)} endpoints)"
        adapter = f" with adapter `{teacher.adapter}`" if teacher.adapter else ""
        lines.append(
            f"- **{name}**: {what}{adapter}, {'for ' + ', '.join(routes[name]) if routes[name] else 'as a reference'}"
        )
    return "## Teachers\n\n" + "\n".join(lines) if lines else ""


def _changes(run: RunFolder, step: int | None) -> str:
    """Return the teachers that were others before some step; empty if none were."""
    record = identity.load(run.teachers)
    return "\n".join(
        f"- **{one.teacher}** was another one before step {one.step}: {'; '.join(one.what)}"
        for one in (record.changed if record else ())
        if step is None or one.step < step
    )


def _sources(mixture: Mixture) -> str:
    return "## Prompts\n\n" + "\n".join(
        f"- **{name}**: task {source.task}, weight {source.weight:g}" for name, source in mixture.sources.items()
    )


def _scores(run: RunFolder) -> str:
    """Return the scores on held-out data; empty before the evaluation, or without one."""
    if not run.results.is_file():
        return ""
    results = Results.read(run.results)
    return f"## Scores on held-out data, 0-100\n\n{results.markdown()}" if results.rows else ""


def _metrics(steps: list[dict[str, float | None]]) -> str:
    last = steps[-LAST:]
    names = [name for name in (last[-1] if last else {}) if any(_is(name, shown) for shown in SHOWN)]
    lines = []
    for name in names:
        values = [value for row in last if (value := row.get(name)) is not None]
        if values:
            lines.append(f"| {name} | {sum(values) / len(values):.4g} | {_meaning(name)} |")
    table = "| metric | mean | meaning |\n|---|---|---|\n" + "\n".join(lines)
    return f"## The last {len(last)} steps\n\nOn training prompts.\n\n{table}" if lines else ""


def _is(name: str, pattern: str) -> bool:
    return name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]))


def _meaning(name: str) -> str:
    assert documented(name)
    return METRICS.get(name) or METRICS[f"{name.partition('/')[0]}/*"]
