"""The demo world: two tasks with real held-out data, and a tiny Qwen3-VL that can learn them on a CPU.

- *text*: additions of two two-digit numbers, column by column: `7+5=12 4+8=12+1=13 =132`.
- *image*: two handwritten digits (scans that scikit-learn ships) side by side: `3+5=8`.

Each task has three splits. `few` is all that the base student ever sees; `train` (which contains `few`) is for the
teachers and for the distillation prompts; `heldout` shares no addition and no scan with the other two. Solutions can be
`careless`: carries are forgotten, lookalike digits are misread.

A base that learned from few and careless solutions is weak *and knows the alternative*: it gives the right token a
probability near 0.2, so its own samples contain it. A base that only saw too little data gives the wrong token 0.9 and
the right one 0.005, and distillation on its own samples hardly changes it.

The tokenizer is a byte-level BPE with the rules and special tokens of Qwen. It is trained on English text that
scikit-learn ships, so nothing is downloaded.
"""

import functools
import importlib.resources
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

Split = Literal["few", "train", "heldout"]

SCAN_SPLITS: dict[Split, range] = {"few": range(400), "train": range(1400), "heldout": range(1400, 1797)}
ADDITION_SPLITS: dict[Split, slice] = {"few": slice(600), "train": slice(6500), "heldout": slice(6500, None)}
LOOKALIKES = {7: 1, 8: 3, 9: 4}  # digit -> the digit for which a careless reader takes it

CONTROL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ADDED_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
VOCAB_SIZE = 1024  # a multiple of 64 (vLLM), with the 26 tokens above

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class Row(TypedDict):
    """One problem: a chat without its answer, PNG images in order of mention, the answer, a worked solution."""

    messages: list[dict[str, Any]]
    images: list[bytes]
    answer: str
    solution: str


def additions(split: Split, n: int, seed: int, careless: float = 0.0) -> list[Row]:
    """Return `n` rows of the text task, without repeats while the split has any left.

    Args:
        careless: share of the carries that the worked solution forgets (`answer` is always right).
    """
    pairs = _addition_pairs()[ADDITION_SPLITS[split]]
    rng = random.Random(f"additions-{split}-{seed}")
    return [_addition(a, b, forget=rng.random() < careless) for a, b in _draw(pairs, n, rng)]


def digit_sums(split: Split, n: int, seed: int, careless: float = 0.0) -> list[Row]:
    """Return `n` rows of the image task; each has two scans of the split, drawn independently.

    Args:
        careless: share of the `LOOKALIKES` that the worked solution misreads (`answer` is always right).
    """
    rng = random.Random(f"digit_sums-{split}-{seed}")
    scans = SCAN_SPLITS[split]
    return [
        _digit_sum(rng.choice(scans), rng.choice(scans), (rng.random() < careless, rng.random() < careless))
        for _ in range(n)
    ]


def _draw(pairs: list[tuple[int, int]], n: int, rng: random.Random) -> list[tuple[int, int]]:
    drawn: list[tuple[int, int]] = []
    while len(drawn) < n:
        drawn += rng.sample(pairs, min(len(pairs), n - len(drawn)))
    return drawn


@functools.cache
def _addition_pairs() -> list[tuple[int, int]]:
    """Return all 8,100 pairs of two-digit numbers, in a fixed order."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    return pairs


def _addition(a: int, b: int, forget: bool) -> Row:
    units = a % 10 + b % 10
    tens = a // 10 + b // 10
    steps = f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}={tens}"
    if units >= 10 and not forget:
        steps = f"{steps}+1={tens + 1}"
        tens += 1
    return Row(
        messages=[{"role": "user", "content": [{"type": "text", "text": f"What is {a}+{b}?"}]}],
        images=[],
        answer=str(a + b),
        solution=f"{steps} ={tens}{units % 10}",
    )


def _digit_sum(left: int, right: int, misread: tuple[bool, bool]) -> Row:
    scans, labels = _scans()
    pixels = np.kron(np.hstack([scans[left], scans[right]]), np.ones((4, 4)))  # 8 x 16 -> 32 x 64
    file = io.BytesIO()
    Image.fromarray((255 - pixels * 255 / 16).astype(np.uint8)).convert("RGB").save(file, format="PNG")
    truth = [int(labels[left]), int(labels[right])]
    a, b = (LOOKALIKES.get(digit, digit) if wrong else digit for digit, wrong in zip(truth, misread, strict=True))
    return Row(
        messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is their sum?"}]}],
        images=[file.getvalue()],
        answer=str(sum(truth)),
        solution=f"{a}+{b}={a + b}",
    )


@functools.cache
def _scans() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return [1797, 8, 8] ink from 0 to 16, and [1797] labels."""
    digits = load_digits()
    return digits.images, digits.target


def build_student(folder: str | Path, seed: int = 0, *, scale: int = 1) -> None:
    """Write an untrained student (model, processor, generation config) that transformers and vLLM can load.

    Args:
        scale: factor of its widths and heads; 2 gives 3.5 times as many parameters as 1.
    """
    processor = build_processor()
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(_model_config(processor.tokenizer, scale))
    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_processor() -> Qwen3VLProcessor:
    """Return the processor of the demo's models: 32 x 32 pixels are one visual token."""
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": pixels}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=build_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=CHAT_TEMPLATE,
    )


def build_tokenizer() -> Qwen2Tokenizer:
    """Train a byte-level BPE with Qwen's splitting rules and control tokens; `VOCAB_SIZE` ids in total."""
    trained = Tokenizer(BPE())
    rules = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trained.normalizer = rules.normalizer
    trained.pre_tokenizer = rules.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(ADDED_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_english(), trainer)
    model = json.loads(trained.to_str())["model"]
    merges: list[Any] = [tuple(pair) for pair in model["merges"]]  # annotated as strings upstream, accepted as pairs
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS])
    if len(tokenizer) != VOCAB_SIZE:
        raise RuntimeError(
            f"the tokenizer has {len(tokenizer)} entries, not {VOCAB_SIZE}: the English text is too short"
        )
    return tokenizer


def _english() -> Iterator[str]:
    """Yield text for the BPE: descriptions of scikit-learn's data sets, and the words of the chat format."""
    for file in sorted(importlib.resources.files("sklearn.datasets.descr").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".rst"):
            yield file.read_text(encoding="utf-8")
    yield from ["system\nuser\nassistant\nWhat is their sum? What is the"] * 50


def _model_config(tokenizer: Qwen2Tokenizer, scale: int) -> Qwen3VLConfig:
    """Return a configuration of about 1 M parameters at scale 1; vLLM's CPU attention needs head_dim 32 or more."""
    ids = tokenizer.get_vocab()
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128 * scale,
            "intermediate_size": 384 * scale,
            "num_hidden_layers": 4,
            "num_attention_heads": 4 * scale,
            "num_key_value_heads": 4 * scale,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "initializer_range": 0.04,
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],  # sums to head_dim / 2
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64 * scale,
            "intermediate_size": 128 * scale,
            "num_heads": 2 * scale,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 128 * scale,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.04,
        },
    )
