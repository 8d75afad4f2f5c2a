"""Fake teachers that are good except for one thing, for tests of the preflight, and a view of its checks."""

import base64
import io
import json
import random

from fake_vllm import FakeVLLM
from PIL import Image

TEXT = ["reachable", "vocabulary", "scores", "control tokens", "context", "top-k", "same score twice"]
IMAGE = [*TEXT[:3], "image tokens", *TEXT[3:], "image canary"]


class Liar(FakeVLLM):
    """A fake server that is good except for one thing, its `lie`; it claims to take `length` tokens."""

    def __init__(self, encoder, lie="", *, length=2048, top_k=20, **settings):
        super().__init__(encoder, **settings)
        self.lie, self.length, self.top_k = lie, length, top_k

    def _reply(self, line, headers, request, fault):
        verb, path, _ = line.split()
        if headers.get("authorization") != f"Bearer {self.key}":
            return 401, b""
        if (verb, path) == ("GET", "/v1/models"):
            return 200, json.dumps({"object": "list", "data": [{"id": "tiny", "max_model_len": self.length}]}).encode()
        if (verb, path) == ("POST", "/detokenize"):
            return self._detokenize(request["tokens"])
        if self.lie == "tokenizes again":
            text = self.encoder.tokenizer.decode(request["token_ids"])
            request = request | {"token_ids": self.encoder.tokenizer.encode(text)}
            parts = request.get("content_parts", ())
            if parts and request["token_ids"].count(self.encoder.image_token) != len(parts):
                return 400, b'{"error":{"message":"more placeholders than images"}}'
        settings = request["sampling_params"]
        if settings.get("prompt_logprobs", 0) > self.top_k:
            return 400, b'{"error":{"message":"Requested prompt logprobs of 20, which is greater than max allowed: 5"}}'
        if self.lie == "500 with images" and "content_parts" in request:
            return 500, b'{"error":{"message":"EngineCore encountered an issue"}}'
        status, body = super()._reply(line, headers, request, fault)
        if status != 200 or fault == "garbage":
            return status, body
        reply = json.loads(body)
        if len(reply["prompt_token_ids"]) + settings["max_tokens"] > self.length:
            return 400, b'{"error":{"message":"the maximum model length"}}'
        return status, json.dumps(self._twist(reply)).encode()

    def _detokenize(self, tokens):
        if self.lie == "no detokenize":
            return 404, b'{"detail":"Not Found"}'
        swap = {700: 701, 701: 700} if self.lie == "two ids swapped" else {}
        shift = 3 if self.lie == "shifted vocabulary" else 0
        text = self.encoder.tokenizer.decode([swap.get(t, t + shift if t >= 300 else t) for t in tokens])
        return 200, json.dumps({"prompt": text}).encode()

    def _twist(self, reply):
        ids, rows = reply["prompt_token_ids"], reply["prompt_logprobs"]
        pad = self.encoder.image_token
        if self.lie == "double expansion" and pad in ids:
            extra, at = ids.count(pad) - 1, ids.index(pad)
            ids[at:at], rows[at:at] = [pad] * extra, [rows[at]] * extra
        for i, row in enumerate(rows):
            for entry in row.values() if row else ():
                if self.lie == "noise":
                    entry["logprob"] -= random.random()
                if self.lie == "other weights":
                    entry["logprob"] -= i % 3 / 4
        return reply


class Blind(Liar):
    """A server that expands the images and then ignores them, or ignores the positions in them."""

    def _twist(self, reply):
        return reply

    def _reply(self, line, headers, request, fault):
        if "content_parts" in request:
            parts = [dict(part) for part in request["content_parts"]]
            for part in parts:
                part["url"] = self._seen(part["url"])
            request = request | {"content_parts": parts}
        return super()._reply(line, headers, request, fault)

    def _seen(self, url):
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        colours = (
            sorted(image.get_flattened_data())
            if self.lie == "bag of pixels"
            else [(0, 0, 0)] * (image.width * image.height)
        )
        flat = Image.new("RGB", image.size)
        flat.putdata(colours)
        file = io.BytesIO()
        flat.save(file, "PNG")
        return "data:image/*;base64," + base64.b64encode(file.getvalue()).decode()


def bad(checks):
    return [(check.of, check.name, check.state) for check in checks if check.state != "ok"]


def of(checks, name):
    return next(check for check in checks if check.name == name)
