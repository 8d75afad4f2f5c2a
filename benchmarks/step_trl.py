"""TRL's side of `step.py`, in a separate process: `python step_trl.py STUDENT TEACHER SHARDS... --steps N`.

It prints times as JSON.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from mmopd.prompts import Shards

PROMPTS = 16
GROUP = 16
MAX_TOKENS = 24


class Times(TrainerCallback):
    """Records the end of each optimiser step."""

    def __init__(self) -> None:
        self.ends: list[float] = [time.perf_counter()]

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())


def rows(folders: list[Path], steps: int) -> list[dict[str, Any]]:
    """Return the rows of a data set: each prompt GROUP times, one source after the other."""
    sources = [Shards(folder) for folder in folders]
    found = []
    for n in range(steps * PROMPTS):
        prompt = sources[n % len(sources)][n // len(sources)]
        images = [Pillow.open(io.BytesIO(image)).convert("RGB") for image in prompt.images]
        text = "".join(
            part["text"]
            for message in prompt.messages
            for part in ([{"text": message["content"]}] if isinstance(message["content"], str) else message["content"])
            if "text" in part
        )
        found += [{"prompt": [{"role": "user", "content": text}], "images": images}] * GROUP
    return found


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("shards", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    features = Features({"prompt": [{"role": Value("string"), "content": Value("string")}], "images": List(Image())})
    settings = DistillationConfig(
        output_dir="trl",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=given.micro,
        gradient_accumulation_steps=PROMPTS * GROUP // given.micro,
        max_steps=given.steps,
        max_completion_length=MAX_TOKENS,
        learning_rate=1e-4,
        # The defaults of recipes/demo.yaml; neither side decays biases and norms. (TRL's warm-up begins with a step at
        # 0, ours at 1/6.)
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        temperature=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        beta=1.0,
    )
    times = Times()
    trainer = DistillationTrainer(
        Qwen3VLForConditionalGeneration.from_pretrained(given.student),
        Qwen3VLForConditionalGeneration.from_pretrained(given.teacher),
        args=settings,
        train_dataset=Dataset.from_list(rows(given.shards, given.steps), features=features),
        processing_class=AutoProcessor.from_pretrained(given.student, trust_remote_code=False),
        callbacks=[times],
    )
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    seconds = [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)]
    print(json.dumps({"trl": trl.__version__, "seconds": seconds, "lengths": lengths}))


if __name__ == "__main__":
    main()
