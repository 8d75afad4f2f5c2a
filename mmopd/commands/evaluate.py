"""`mmopd eval`: evaluate model folders with a suite."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mmopd import catalog
from mmopd.capacity.weights import check_model
from mmopd.config import Recipe
from mmopd.evaluate.candidates import Candidate, evaluate_all
from mmopd.evaluate.run import read_suite, warm_up
from mmopd.evaluate.table import Results, Row
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.run_folder import make_private
from mmopd.serving.servers import serve_in_stage
from mmopd.serving.specs import ServerSpec


def evaluate_models(suite: Path, models: Sequence[Path], recipe: Recipe, out: Path, console: Console) -> Results:
    """Run `mmopd eval`: serve one model after the other and evaluate it; write the results and return them.

    Raises:
        UserError: a folder is missing, or a server does not start.
    """
    resolved = read_suite(catalog.find(suite), Path.cwd())
    logs = make_private(out) / "logs"
    logs.mkdir(exist_ok=True)
    for model in models:
        check_model(model)
    rows: list[Row] = []
    warm_up(resolved)
    with Stages(console) as stages, Children() as children:
        for model in models:
            name = model.resolve().name
            spec = ServerSpec(name, model, recipe.student.engine, updatable=False)
            with serve_in_stage([spec], children, logs, stages) as servers:
                candidate = Candidate(str(model), "base", servers[name], model, spec.engine)
                rows += evaluate_all(resolved, [candidate], out, stages)
    results = Results.of(rows)
    results.write(out)
    return results
