"""A package named `vllm` that starts immediately: an API server with vLLM's routes for readiness, and an engine
process.

It is for tests of what surrounds servers: supervisors, restarts, the command line. A model folder with a file `crash`
does not start.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

MODULES = [  # modules that mmopd imports from the real package
    "entrypoints.launchers.api_server.routers",
    "v1.engine.async_llm",
    "v1.engine.utils",
    "v1.executor.uniproc_executor",
    "v1.worker.cpu_worker",
]
REGISTRY = "class ModelRegistry:\n    models = {}\n"
ENTRY = """
import argparse, http.server, json, os, pathlib, signal, socket, sys, time, uuid

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer " + os.environ["VLLM_API_KEY"]:
            return self.answer(401, {})
        if self.path == "/pids":
            return self.answer(200, {"server": os.getpid(), "engine": ENGINE})
        self.answer(200, {"data": [{"id": name} for name in NAMES]})

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass

def main():
    global NAMES, ENGINE
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--lora-modules", nargs="*", default=[])
    options, _ = parser.parse_known_args()
    if pathlib.Path(options.model, "crash").exists():
        sys.exit("the weights are broken")
    NAMES = options.served_model_name + [module.partition("=")[0] for module in options.lora_modules]
    server = http.server.ThreadingHTTPServer((options.host, options.port), Handler)
    socket.socket(socket.AF_UNIX).bind(os.path.join(os.environ["VLLM_RPC_BASE_PATH"], str(uuid.uuid4())))
    parent = os.getpid()
    ENGINE = os.fork()
    if ENGINE == 0:  # it holds the port open, as the real one does, and outlives its parent
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    print("serving", NAMES, flush=True)
    server.serve_forever()
"""


def install(folder: Path) -> str:
    """Write the package, and return the PYTHONPATH with which it is found first."""
    root = folder / "fake_package"
    for module in [*MODULES, "entrypoints.launchers.api_server.entry"]:
        path = root / "vllm" / Path(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ENTRY if module.endswith("entry") else "", encoding="utf-8")
    for path in [root / "vllm", *(p for p in (root / "vllm").rglob("*") if p.is_dir())]:
        (path / "__init__.py").write_text(REGISTRY if path.name == "vllm" else "", encoding="utf-8")
    return str(root)


def fake_model(folder: Path) -> Path:
    """Write a folder that the fake server accepts as a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["Fake"]}', encoding="utf-8")
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder
