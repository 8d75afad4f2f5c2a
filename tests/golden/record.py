"""Write `responses.json`, the responses that golden losses are computed from: `python tests/golden/record.py`.

It was run once. Running it again, after a change of the demo's student say, makes other responses and other losses.

A step has four prompts (two with an image) with four responses each. Token ids are random, with the end token last. The
student's log-probs are those of the untrained student, rounded. The teacher's and the reference's are the student's
with noise; the teacher's are higher where the response is right. Some responses have no score, some have an unknown or
a soft outcome, some tokens are further from the teacher than `log_ratio_clip`, and half of the responses to images have
a score without the image.
"""

import base64
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from worker import TRAIN

from mmopd.config import Algorithm, Train
from mmopd.demo.world import additions, build_student, digit_sums
from mmopd.modality import Encoder
from mmopd.records import Encoded, Prompt
from mmopd.train.distributed import start, stop
from mmopd.train.prefix_tree import Item
from mmopd.train.trainer import Trainer

STEPS, PROMPTS, GROUP, LIKELIEST = 20, 12, 4, 3
FILE = Path(__file__).with_name("responses.json")


def main() -> None:
    random = Random(0)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "student"
        build_student(model)
        encoder = Encoder(model)
        trainer = Trainer(model, encoder, Train.model_validate(TRAIN), Algorithm(), start(60))
        rows = zip(additions("train", PROMPTS // 2, 0), digit_sums("train", PROMPTS // 2, 0), strict=True)
        prompts = [encode(encoder, f"golden/{k}", row) for k, row in enumerate(row for pair in rows for row in pair)]
        end = encoder.processor.tokenizer.eos_token_id
        steps = [step(random, trainer, prompts, end) for _ in range(STEPS)]
        stop()
    lines = ",\n".join(json.dumps(rows, separators=(",", ":")) for rows in steps)
    pool = ",\n".join(json.dumps(write_prompt(prompt), separators=(",", ":")) for prompt in prompts)
    FILE.write_text(f'{{"prompts":[\n{pool}\n],"steps":[\n{lines}\n]}}\n', encoding="utf-8")


def encode(encoder: Encoder, key: str, row: Any) -> Encoded:
    modality = "image" if row["images"] else "text"
    return encoder.encode(Prompt(key, "golden", modality, tuple(row["messages"]), tuple(row["images"]), ""))


def write_prompt(encoded: Encoded) -> dict[str, Any]:
    image = base64.b64encode(encoded.prompt.images[0]).decode() if encoded.prompt.images else ""
    key = encoded.prompt.key
    return {"key": key, "ids": encoded.ids, "expanded": encoded.expanded, "grids": encoded.grids, "image": image}


def step(random: Random, trainer: Trainer, prompts: list[Encoded], end: int) -> list[dict[str, Any]]:
    """Draw the responses of a step from prompts that alternate between text and image."""
    texts, images = random.sample(range(0, PROMPTS, 2), 2), random.sample(range(1, PROMPTS, 2), 2)
    numbers = [number for number in (*texts, *images) for _ in range(GROUP)]
    tokens = [[*(random.randrange(900) for _ in range(random.randint(0, 8))), end] for _ in numbers]
    student = trainer.logprobs(
        [Item.to_score(prompts[number], tuple(ids)) for number, ids in zip(numbers, tokens, strict=True)]
    )
    return [
        response(random, number, ids, logprobs.tolist())
        for number, ids, logprobs in zip(numbers, tokens, student, strict=True)
    ]


def response(random: Random, number: int, tokens: list[int], student: list[float]) -> dict[str, Any]:
    outcome = random.choice((1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.75, None))
    better = 0.3 if outcome else -0.3
    teacher = [min(-0.01, logprob + random.gauss(better, 0.7) - 12 * (random.random() < 0.02)) for logprob in student]
    seen = number % 2 == 1 and random.random() < 0.5
    scored = random.random() > 0.06
    return {
        "prompt": number,
        "tokens": tokens,
        "student": rounded(student),
        "outcome": outcome,
        "teacher": rounded(teacher) if scored else None,
        "weight": 1.0 if number % 2 else 0.5,
        "reference": rounded([min(-0.01, logprob + random.gauss(0, 0.4)) for logprob in student]),
        "blind": rounded([min(-0.01, logprob - random.gauss(0.5, 1)) for logprob in teacher])
        if seen and scored
        else None,
        "likeliest": [likeliest(random, token) for token in tokens],
    }


def likeliest(random: Random, token: int) -> list[tuple[int, float]]:
    """Draw (id, log-prob) of the teacher's likeliest tokens; the sampled one is among them in half of the cases."""
    ids = random.sample(range(900), LIKELIEST)
    if token not in ids and random.random() < 0.5:
        ids[0] = token
    first = random.uniform(-1.5, -0.2)
    return [(one, round(first - 1.5 * k, 3)) for k, one in enumerate(ids)]


def rounded(logprobs: list[float]) -> list[float]:
    return [round(logprob, 3) for logprob in logprobs]


if __name__ == "__main__":
    main()
