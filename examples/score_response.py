"""Score one response with a teacher: its log-prob of each token.

    mmopd serve teachers/demo.yaml                # in another terminal; it writes endpoints.json
    python examples/score_response.py [FLEET [ENDPOINTS [STUDENT]]]

Defaults: teachers/demo.yaml, endpoints.json, and the demo's student, whose tokenizer the teachers share.
"""

import asyncio
import sys
from pathlib import Path

from mmopd import Prompt, load_fleet, load_tasks, user_turn
from mmopd.modality import Encoder
from mmopd.records import Absent
from mmopd.serving.endpoint import load_by_role
from mmopd.teacher.scorer import Scorer

arguments = dict(enumerate(sys.argv[1:]))
fleet = load_fleet(arguments.get(0, "teachers/demo.yaml"))
_, teachers = load_by_role(Path(arguments.get(1, "endpoints.json")))
encoder = Encoder(Path(arguments.get(2, ".mmopd/demo/base")))

question = Prompt("example/0", "additions", "text", tuple(user_turn("27 + 15 =", images=0)), (), "42")
response = (*encoder.tokenizer.encode("42"), encoder.tokenizer.eos_token_id)


async def main() -> None:
    """Ask the teacher on the route of the prompt, and print what it says."""
    async with Scorer(fleet, load_tasks(), teachers, encoder) as scorer:
        score = await scorer.score(encoder.encode(question), response)
    if isinstance(score, Absent):  # never a number: the cause says what failed
        sys.exit(f"no score from {score.teacher}: {score.cause}, {score.detail}")
    print(f"{score.teacher}: {sum(score.logprobs):.3f} nats for the whole response")
    for token, logprob in zip(response, score.logprobs, strict=True):
        print(f"{logprob:8.3f}  {encoder.tokenizer.decode([token])!r}")


asyncio.run(main())
