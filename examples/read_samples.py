"""Read samples.jsonl of a run: responses token by token, with the log-probs of student and teacher.

    python examples/read_samples.py [RUN]

RUN is the folder of a run; default: the newest one under runs/.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

run = Path(sys.argv[1]) if len(sys.argv) > 1 else max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime)
lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
samples = [json.loads(line) for line in lines]
# A sample: step, task, prompt, images (base64), tokens, student and teacher (a log-prob for each token), advantage (in
# the loss), outcome (1 right, 0 wrong, null unknown), teacher_name, kept (in the loss or not), reason.

by_task = defaultdict(list)
for sample in samples:
    by_task[sample["task"]].append(sample)
for task, some in sorted(by_task.items()):
    known = [sample["outcome"] for sample in some if sample["outcome"] is not None]
    right = f"{fmean(known):.0%} right" if known else "no outcome known"
    print(f"{task}: {len(some)} responses at steps {sorted({sample['step'] for sample in some})}, {right}")

# The tokens on which the teacher differs most from the student: there the student has most to learn.
differences = [
    (teacher - student, i, sample)
    for sample in samples
    for i, (student, teacher) in enumerate(zip(sample["student"], sample["teacher"], strict=True))
]
print("\nteacher - student, in nats")
for difference, i, sample in sorted(differences, key=lambda one: one[0])[:5]:
    before = "".join(sample["tokens"][:i])
    print(
        f"{difference:8.2f}  {before!r} then {sample['tokens'][i]!r}  (step {sample['step']}, {sample['teacher_name']})"
    )
