"""An image prompt for a server and for the model itself, and random adapters."""

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from mmopd.records import Encoded, Prompt
from mmopd.serving import wire
from mmopd.serving.endpoint import Endpoint


def make_adapters(model: Path, folder: Path) -> dict[str, Path]:
    """Write two adapters with random weights, one of them also for the vision part."""
    words = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    modules = {
        "words": (4, words),
        "words_and_vision": (8, rf"({words}|.*visual\.(blocks|merger).*\.(qkv|proj|linear_fc1|linear_fc2))"),
    }
    for seed, (name, (rank, target)) in enumerate(modules.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=target, init_lora_weights=False)
        get_peft_model(load_model(model), config).save_pretrained(str(folder / name))
    return {name: folder / name for name in modules}


def load_model(path: Path) -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


class Question:
    """An image prompt, for a server and for the model itself."""

    def __init__(self, model: Path, row: Any) -> None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(model)
        text = processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        self.ids = processor.tokenizer.encode(text)
        self.image = row["images"][0]
        self.url = "data:image/png;base64," + base64.b64encode(self.image).decode()
        self.inputs = processor(text=[text], images=[Image.open(io.BytesIO(row["images"][0]))], return_tensors="pt")

    def ask(self, server: Endpoint) -> Any:
        """Return 12 greedy tokens."""
        body = {
            "token_ids": self.ids,
            "content_parts": [{"type": "image_url", "url": self.url}],
            "sampling_params": {
                "max_tokens": 12,
                "temperature": 0,
                "logprobs": 0,
                "detokenize": False,
                "ignore_eos": True,
            },
        }
        reply = httpx.post(f"{server.url}/inference/v1/generate", json=body, headers=server.headers, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]

    def score(self, server: Endpoint, tokens: list[int]) -> torch.Tensor:
        """Return the log-probs of `tokens` after the prompt."""
        prompt = Prompt("s/0", "t", "image", (), (self.image,), "")
        body = wire.scoring_body(server.model, Encoded(prompt, tuple(self.ids), (), ()), tokens)
        headers = {**server.headers, wire.REQUEST_ID: "x", "Content-Type": "application/json"}
        reply = httpx.post(server.url + wire.PATH, content=body, headers=headers, timeout=60)
        assert reply.status_code == 200, reply.text
        return torch.tensor(wire.parse_scores(reply.content, "x", self.inputs["input_ids"][0].tolist(), tokens))

    @torch.no_grad()
    def forward(self, model: Any, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
        """Return the model's own choice at each position, and its log-probs of `tokens`."""
        ids = torch.cat([self.inputs["input_ids"], torch.tensor([tokens])], 1)
        pixels = {name: self.inputs[name] for name in ("pixel_values", "image_grid_thw")}
        types = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **pixels).logits[0]
        logprobs = logits.log_softmax(-1)[-len(tokens) - 1 : -1]
        return logprobs.argmax(-1).tolist(), logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
