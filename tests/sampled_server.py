"""A fake vLLM whose answers a test plants, in a thread of its own, and rows of sampled benchmarks."""

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fake_vllm import FakeVLLM, Fault, _choice, logprob

from mmopd.modality import Encoder
from mmopd.serving.endpoint import Endpoint

Answer = Callable[[str, int], str]  # (text of the prompt, seed) -> response


class Planted(FakeVLLM):
    """Answers as told; a response that is longer than `max_tokens` is cut."""

    def __init__(self, encoder: Encoder, answer: Answer, faults: Callable[[int], Fault], **settings: Any) -> None:
        super().__init__(encoder, faults, **settings)
        self.answer = answer
        self.prompt = ""

    def _expand(self, ids: list[int], images: list[bytes]) -> list[int]:
        self.prompt = self.encoder.tokenizer.decode(ids)
        return super()._expand(ids, images)

    def _sample(self, index: int, start: int, images: list[bytes], settings: dict[str, Any]) -> dict[str, Any]:
        tokens = [*self.encoder.encode_answer(self.answer(self.prompt, settings["seed"] + index))]
        finish = "length" if len(tokens) > settings["max_tokens"] else "stop"
        tokens = tokens[: settings["max_tokens"]]
        logprobs = [logprob(t, start + i, images) for i, t in enumerate(tokens)]
        return _choice(index, tokens, logprobs, finish, self.version)


class PlantedServer:
    """Run `Planted` in a thread: `with PlantedServer(encoder, answer) as server`, then `server.endpoint`."""

    def __init__(
        self, encoder: Encoder, answer: Answer, faults: Callable[[int], Fault] = lambda n: None, **settings: Any
    ) -> None:
        self.fake = Planted(encoder, answer, faults, **settings)
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    @property
    def endpoint(self) -> Endpoint:
        return self.fake.endpoint

    @property
    def seeds(self) -> list[int]:
        return [request["sampling_params"]["seed"] for request in self.fake.requests]

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        async with self.fake:
            self._ready.set()
            await self._end.wait()


def arena_rows(answers: Sequence[object]) -> list[dict[str, Any]]:
    """Return rows in the columns of MathArena: problem i asks for answer i."""
    return [{"problem_idx": i, "problem": f"What is x{i}?", "answer": a} for i, a in enumerate(answers, 1)]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
