"""`mmopd serve`: serve the teachers of a fleet without a run, for runs of other jobs or machines."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmopd.capacity.weights import check_model
from mmopd.config import Fleet
from mmopd.errors import UserError
from mmopd.runtime.network import public_url
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.run_folder import make_private
from mmopd.serving import endpoint
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import Servers, serve_in_stage
from mmopd.serving.specs import to_specs
from mmopd.teacher.fleet import key_in, warn_of
from mmopd.teacher.identity import fingerprint_of

WATCH_EVERY = 0.5  # seconds


def serve(fleet: Fleet, *, host: str, out: Path, key_variable: str | None, console: Console) -> None:
    """Serve every teacher that has a `model`, write their endpoints to `out`, and run until interrupted.

    Raises:
        UserError: there is nothing to serve.
        CheckpointError: a model cannot be served; see `check_model` and `fingerprint_of`.
        ServerError: a server did not start, or died too often.
    """
    key = key_in(key_variable, "mmopd serve", "--api-key-env") if key_variable else None
    specs = to_specs(fleet)
    if not specs:
        raise UserError("no teacher of this fleet has a `model`: all run elsewhere, and there is nothing to serve")
    for model in {spec.model for spec in specs}:
        check_model(model)
    fingerprints = {
        name: fingerprint_of(teacher) for name, teacher in fleet.teachers.items() if teacher.model is not None
    }
    warn_of(host, console)
    logs = make_private(out.with_name(f"{out.stem}-logs"))
    with Children() as children, ExitStack() as stack:
        with Stages(console) as stages:
            servers = stack.enter_context(serve_in_stage(specs, children, logs, stages, host=host, key=key))
        shown = [
            dataclasses.replace(one, url=public_url(one.url, host), fingerprint=fingerprints[one.teacher])
            for one in servers.values()
        ]
        stack.callback(out.unlink, missing_ok=True)
        endpoint.save(out, shown)
        console.print(_table(fleet, shown, servers))
        console.print(
            f"Endpoints and their key: {out}\nUse them: mmopd train RECIPE --endpoints {out}\nLogs: "
            f"{logs}\nCtrl-C stops.",
            markup=False,
        )
        while True:
            servers.check()
            time.sleep(WATCH_EVERY)


def _table(fleet: Fleet, endpoints: Sequence[Endpoint], servers: Servers) -> Table:
    table = Table(title="Served", title_justify="left")
    for column in ("teacher", "URL", "model", "GPUs"):
        table.add_column(column, overflow="fold")
    for one in endpoints:
        teacher = fleet.teachers[one.teacher]
        model = f"{teacher.model} + {teacher.adapter}" if teacher.adapter else str(teacher.model)
        table.add_row(escape(one.name), escape(one.url), escape(model), servers.gpus[one.name] or "CPU")
    return table
