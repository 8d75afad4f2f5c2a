"""The server of the page: read-only, on loopback, with a token in the URL.

Everything is below /TOKEN/, so that no other user and no other page of the browser can read a run. The header Host must
name this machine, since a page elsewhere could resolve its own name to 127.0.0.1. The page loads nothing from
elsewhere, and a browser is told to refuse it (Content-Security-Policy).
"""

import hmac
import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmopd import __version__
from mmopd.errors import UserError
from mmopd.report import html
from mmopd.report.run_files import RunFiles
from mmopd.runtime import logs
from mmopd.runtime.network import HOST
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import guarded_http
from mmopd.watch.overlay import COLOURS, RUNS, names_of, overlay
from mmopd.watch.view import View, WatchedRun, digest, log_lines

TOKEN_VARIABLE = "MMOPD_WATCH_TOKEN"  # of the page that `mmopd train --watch` starts
HOSTS = [HOST, "localhost"]
HEADERS = {  # 'unsafe-inline': plotly writes style attributes
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
FILES = {  # of the page: (package, type)
    "report.css": ("mmopd.report", "text/css"),
    "watch.css": ("mmopd.watch", "text/css"),
    "page.js": ("mmopd.report", "text/javascript"),
    "watch.js": ("mmopd.watch", "text/javascript"),
}
NEVER, LONG = {"Cache-Control": "no-store"}, {"Cache-Control": "private, max-age=86400"}
REFUSED = "Open the whole URL that `mmopd watch` or `mmopd train --watch` has printed: it ends with a token.\n"


class Token:
    """Passes on requests below /TOKEN/, and adds the headers of HEADERS to all answers."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        given, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not hmac.compare_digest(given.encode(errors="replace"), self._token):
            await PlainTextResponse(REFUSED, 403, NEVER)(scope, receive, with_headers)
        elif not slash:
            await RedirectResponse(f"/{given}/")(scope, receive, with_headers)
        else:
            await self._app({**scope, "path": f"/{rest}"}, receive, with_headers)


def application(runs: Sequence[Path], token: str) -> Starlette:
    """Return the application that shows these run folders.

    Raises:
        UserError: a folder is not that of a run, or there are too many.
    """
    if len(runs) > RUNS:
        raise UserError(f"{len(runs)} runs: at most {RUNS} can be told apart in a chart")
    for run in runs:
        if not run.is_dir() or not (RunFiles(RunFolder(run)).there() or RunFolder(run).status.is_dir()):
            raise UserError(f"{run}: not a run folder: it has neither recipe.yaml nor metrics.jsonl")
    names = names_of([str(run.resolve()) for run in runs])
    watched = [WatchedRun(run, name) for run, name in zip(runs, names, strict=True)]

    def page(request: Request) -> Response:
        template = html.environment("mmopd.watch").get_template("watch.html.j2")
        text = template.render(runs=names, version=__version__)
        return Response(text.encode("utf-8", "replace"), media_type="text/html; charset=utf-8", headers=NEVER)

    def state(request: Request) -> Response:
        asked = request.query_params
        number = int(asked.get("run", "0")) if asked.get("run", "0") in map(str, range(len(watched))) else 0
        found = _state(watched, number, asked.get("log", ""), set(asked.get("have", "").split(",")))
        return Response(json.dumps(found, allow_nan=False), media_type="application/json", headers=NEVER)

    def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name == "plotly.js":
            return Response(html.plotly(), media_type="text/javascript", headers=LONG)
        if name not in FILES:
            return PlainTextResponse("no such file\n", 404)
        package, kind = FILES[name]
        return Response(html.resource(name, package), media_type=kind, headers=LONG)

    routes = [Route("/", page), Route("/state", state), Route("/{name}", file)]
    guards = [
        Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
        Middleware(Token, token=token),
    ]
    return Starlette(routes=routes, middleware=guards)


def _state(watched: Sequence[WatchedRun], number: int, log: str, have: set[str]) -> dict[str, Any]:
    """Return all runs in a line each, and the parts of one run of which the page does not have the digest yet."""
    views = [one.view() for one in watched]
    view = views[number]
    names, shown, lines = log_lines(watched[number].run, log)
    macros: Any = html.environment("mmopd.watch").get_template("watch_parts.html.j2").module
    parts = view.parts() | {"log-names": macros.log_names(names, shown), "log": macros.log(lines)}
    if len(views) > 1:
        parts["runs"] = macros.runs([_line(*one) for one in zip(views, COLOURS, strict=False)], number)
    charts = overlay({one.name: one.curves for one in views}) if len(views) > 1 else view.curves
    marks = view.marks if len(views) == 1 else []
    data = json.dumps({"curves": charts, "difficulty": view.difficulty, "marks": marks}, allow_nan=False)
    digests = {name: digest(text) for name, text in {**parts, "data": data}.items()}
    return {
        "title": f"{view.done}/{view.steps}" if view.steps and view.now.state == "running" else "",
        "name": view.name,
        "digests": digests,
        "parts": {name: str(text) for name, text in parts.items() if digests[name] not in have},
        "data": json.loads(data) if digests["data"] not in have else None,
    }


def _line(view: View, colour: str) -> Mapping[str, Any]:
    last = view.metrics[-1] if view.metrics else {}
    return {"name": view.name, "colour": colour, **view.headline(), "right": last.get("correct/sampled")}


def listen(port: int) -> socket.socket:
    """Return a socket on loopback.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: another program listens there.
    """
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen(64)
    except OSError as error:
        found.close()
        raise UserError(f"--port {port}: {error.strerror}; leave it out to use a free one") from None
    return found


def new_token() -> str:
    """Return a token for a page."""
    return secrets.token_urlsafe(24)


def url(port: int, token: str) -> str:
    """Return the URL of the page."""
    return f"http://{HOST}:{port}/{token}/"


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", server_header=False, **guarded_http.settings()
    )
    uvicorn.Server(config).run(sockets=[listening])


def main() -> None:
    """Serve one run: `python -m mmopd.watch.server PORT RUN`, with the token in the environment."""
    logs.start("watch")
    os.nice(10)
    token = os.environ.pop(TOKEN_VARIABLE)
    serve(application([Path(sys.argv[2])], token), listen(int(sys.argv[1])))


if __name__ == "__main__":
    main()
