"""An OpenAI-compatible server for tests of evaluation, and the rows that they ask."""

import base64
import io
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmopd.serving.endpoint import Endpoint

KEY = "key-of-the-test"
ASKED = frozenset({"messages", "model", "max_tokens", "temperature"})  # keys of a request of lmms-eval


class Server:
    """An OpenAI-compatible server on a free port; `answer` gets the question and its images, and may raise."""

    def __init__(self, answer: Callable[[str, list[Image.Image]], str]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.keys.add(self.headers["Authorization"])
                parts = body["messages"][-1]["content"]
                text = "".join(p["text"] for p in parts if p["type"] == "text")
                urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
                images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
                try:
                    message = {"role": "assistant", "content": answer(text, images)}
                    self._reply(
                        200,
                        {
                            "id": "1",
                            "object": "chat.completion",
                            "created": 0,
                            "model": body["model"],
                            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                        },
                    )
                except RuntimeError as error:
                    self._reply(500, {"error": {"message": str(error)}})

            def _reply(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = Endpoint(
            "student", f"http://127.0.0.1:{self._http.server_port}", "mmopd-student", KEY, "student"
        )

    def __enter__(self) -> "Server":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def write_rows(path: Path, questions: list[str], answers: list[str], images: list[bytes] | None = None) -> Path:
    columns = {
        "question": questions,
        "answer": answers,
        "image": pa.array(images or [None] * len(questions), pa.binary()),
    }
    pq.write_table(pa.table(columns), path)
    return path
