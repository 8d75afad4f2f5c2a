"""Take odd rows through the whole job: `python benchmarks/fuzz.py --rows 5000 --step`, about six minutes.

Images, archives, questions and keys are drawn from lists of odd ones (tests/odd_values.py), with a fixed seed. They go
through prepare, index, plan and encode: each row has to be kept, or left out for its cause. With `--step`, a student of
the demo's size learns right and wrong answers to some of them, and is distilled for four steps with real servers: a
difficulty pass over all rows, then rollouts, verdicts, scores and updates. Some rows break only there: their image does
not decode, the engine refuses them, or their teacher does. The tables must balance. The status is 1 if something should
not be: a total that does not balance, a row that was kept or left out wrongly, a wrong answer that was rewarded, or a
run that ended.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fuzzing import Totals, fuzz  # noqa: E402
from odd_rows import LATE_TASK  # noqa: E402
from odd_values import Key, answered  # noqa: E402

from mmopd.demo import pretrain, world  # noqa: E402
from mmopd.modality.pixels import open_image, to_rgb, write_png  # noqa: E402
from mmopd.model_folder import load_processor  # noqa: E402
from mmopd.prompts import Shards  # noqa: E402
from mmopd.prompts.rows import texts  # noqa: E402
from mmopd.report.metrics import read_lines  # noqa: E402
from mmopd.runtime.run_folder import RunFolder  # noqa: E402
from mmopd.train.checkpoint import STATE  # noqa: E402

STEPS, PROMPTS, GROUP, MAX_TOKENS = 4, 24, 4, 24
ENGINE = {"dtype": "float32", "max_num_seqs": 64, "kv_cache_mib": 128, "enforce_eager": True}
STUDENT_LENGTH, TEACHER_LENGTH = 256, 512  # tokens of a sequence; the student's engine refuses what is longer
LIMIT = TEACHER_LENGTH - 64  # tokens of a prompt; longer ones are left out, since a teacher has to take each prompt
LATE = "late"  # the source with the most rows that break only when they are used; drawn more often than the others
MODELS = Path("models")
SETTINGS = [
    "prepare=null",
    "suite=null",
    "fleet=fleet.yaml",
    "mixture=mixture.yaml",
    f"student.model={MODELS / 'base'}",
    f"rollout.prompts={PROMPTS}",
    f"rollout.group={GROUP}",
    f"rollout.max_tokens={MAX_TOKENS}",
    f"student.engine.max_model_len={STUDENT_LENGTH}",
    "algorithm.difficulty.attempts=1",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={STEPS}",
]


def learn(workspace: Path, totals: Totals, seed: int) -> None:
    """Train a student on right and wrong answers to odd rows, and a teacher that continues from it."""
    rng = random.Random(seed)
    rows: list[world.Row] = []
    for name, (folder, task) in totals.sources.items():
        if name == LATE:
            continue
        shards = Shards(folder, name)
        for number in rng.sample(range(len(shards)), min(100, len(shards))):
            prompt = shards[number]
            key = totals.keys.get(prompt.key, Key(prompt.answer, (prompt.answer,)))
            known = [*key.right, *key.wrong]
            if (
                (shards.tokens(number) or 0) > 200
                or "<|" in str(prompt.messages)
                or not known
                or key.value == "<|im_end|>"
            ):
                continue
            try:
                images = [write_png(to_rgb(open_image(image))) for image in prompt.images]
            except OSError:  # half an image, which an index of headers takes
                continue
            solution = answered(task, rng.choice(known))
            rows.append(
                world.Row(messages=list(prompt.messages), images=images, answer=prompt.answer, solution=solution)
            )
    pretrain.train(workspace / MODELS / "untrained", workspace / MODELS / "base", rows, steps=100, batch=32)
    pretrain.train(workspace / MODELS / "base", workspace / MODELS / "teacher", rows, steps=20, batch=32, seed=1)


def write_settings(workspace: Path, totals: Totals) -> None:
    """Write the mixture and the fleet of the run."""
    sources = {
        name: {"shards": str(folder), "task": task, "max_prompt_tokens": LIMIT, "weight": 4 if name == LATE else 1}
        for name, (folder, task) in totals.sources.items()
    }
    fleet = {
        "teachers": {
            "teacher": {"model": str(MODELS / "teacher"), "engine": ENGINE | {"max_model_len": TEACHER_LENGTH}}
        },
        # A teacher that is told a long answer refuses the prompt, though the student's engine takes it.
        "routes": [{"teacher": "teacher", "task": LATE_TASK, "view": "privileged"}, {"teacher": "teacher"}],
    }
    for name, content in (("mixture", {"sources": sources}), ("fleet", fleet)):
        (workspace / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def train(workspace: Path) -> tuple[RunFolder, str]:
    """Run the job, and return its folder and what it printed.

    Raises:
        SystemExit: it ended with another status than 0.
    """
    command = [sys.executable, "-m", "mmopd", "train", str(ROOT / "recipes" / "demo.yaml"), *SETTINGS, "--run", "run"]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        told = (done.stdout + done.stderr)[-3000:]
        raise SystemExit(f"the run ended with status {done.returncode}; its folder is {workspace / 'run'}:\n{told}")
    return RunFolder(workspace / "run"), done.stdout


def opened(totals: Totals) -> list[Shards]:
    """Open all sources."""
    return [Shards(folder, name) for name, (folder, _) in totals.sources.items()]


def show_step(totals: Totals, run: RunFolder, output: str, console: Console) -> None:
    """Print what became of the prompts of the run; faults are added to the totals."""
    (state,) = run.checkpoints.glob(f"*/{STATE}")
    sources = json.loads(state.read_text(encoding="utf-8"))["caller"]["plan"]["sources"]
    totals.check(all(source["epoch"] == 0 for source in sources.values()), "a source was drawn more than once")
    steps = read_lines(run.metrics)
    planned = sum(source["position"] for source in sources.values())
    used = round(sum(row["responses"] for row in steps) / GROUP)
    replaced: Counter[str] = sum((Counter(source["replaced"]) for source in sources.values()), Counter())
    table = Table("prompts of the steps", "", title=f"{STEPS} steps of {PROMPTS} prompts with real servers")
    table.add_row("planned", f"{planned:,}")
    table.add_row("answered", f"{used:,}")
    for cause, times in replaced.most_common():
        table.add_row(f"replaced: {cause}", f"{times:,}")
    for name in sorted({name for row in steps for name in row if name.startswith(("unknown/", "absent/"))}):
        table.add_row(f"responses, {name}", f"{sum(row.get(name, 0) for row in steps):,.0f}")
    lengths = [shards.tokens(row) or 0 for shards in opened(totals) for row in range(len(shards))]
    left = sum(tokens > LIMIT for tokens in lengths)
    refused = sum(STUDENT_LENGTH - MAX_TOKENS < tokens <= LIMIT for tokens in lengths)
    said = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) rows are left out by max_prompt_tokens", output))
    found = re.search(r"([\d,]+) prompts could not be read", output)
    unreadable = int(found[1].replace(",", "")) if found else 0
    table.add_row("left out by max_prompt_tokens", f"{said:,}")
    table.add_row("difficulty pass: prompts answered", f"{len(lengths) - left - unreadable:,}")
    table.add_row(f"difficulty pass: too long for the engine ({refused:,}), or bad images", f"{unreadable:,}")
    console.print(table)
    totals.check(said == left, f"{left} rows have more than {LIMIT} tokens, {said} were left out")
    most = refused + totals.replaced["undecodable"]
    totals.check(refused < unreadable <= most, f"{unreadable} prompts could not be read, due are {refused} to {most}")
    for cause in ("undecodable", "refused by the engine", "refused by teacher"):
        totals.check(replaced[cause] > 0, f"no prompt was replaced because it was {cause}")
    totals.check(planned == used + replaced.total(), f"{planned} prompts planned, {used} answered, {replaced} replaced")
    totals.check(used == STEPS * PROMPTS, f"{used} prompts answered in {STEPS} steps of {PROMPTS}")


def show_verdicts(totals: Totals, run: RunFolder, console: Console) -> None:
    """Print what was rewarded among the responses that the run has kept as samples; faults are added to the totals."""
    keys: dict[tuple[str, str], list[Key]] = defaultdict(list)
    for name, (folder, task) in totals.sources.items():
        for prompt in Shards(folder, name):
            key = totals.keys.get(prompt.key, Key(prompt.answer, (prompt.answer,)))
            keys[task, "\n".join(texts(prompt.messages))].append(key)
    found: Counter[str] = Counter()
    for row in read_lines(run.samples):
        said = "".join(row["tokens"]).removesuffix("<|im_end|>")
        verdict = {None: "unknown", 1.0: "right", 0.0: "wrong"}.get(row["outcome"], "partly right")
        asked = keys[row["task"], row["prompt"]]
        right = any(said == answered(row["task"], text) for key in asked for text in key.right)
        wrong = asked and all(said in {answered(row["task"], text) for text in key.wrong} for key in asked)
        found[f"{verdict}, and {'right' if right else 'wrong' if wrong else 'neither'} by its key's list"] += 1
        totals.check(not (wrong and verdict in {"right", "partly right"}), f"rewarded: {said!r} for {asked}")
        totals.check(not (right and len(asked) == 1 and verdict != "right"), f"{verdict}: {said!r} for {asked}")
        if verdict == "right" and not right:
            console.print(f"rewarded: {said!r} for {[key.value for key in asked]}", markup=False)
    table = Table("verdict", "responses", title="Responses of samples.jsonl")
    for verdict, times in found.most_common():
        table.add_row(verdict, f"{times:,}")
    console.print(table)


def show(totals: Totals, console: Console) -> None:
    """Print what became of the rows before a run."""
    table = Table("rows", "", title="prepare, index, plan, encode")
    table.add_row("made", f"{totals.rows:,}")
    table.add_row("kept", f"{totals.kept:,}")
    for (stage, cause), times in sorted(totals.left.items()):
        table.add_row(f"{stage}: {cause}", f"{times:,}")
    table.add_section()
    table.add_row("drawn by the plan", f"{totals.drawn:,}")
    table.add_row("encoded", f"{totals.encoded:,}")
    for cause, times in totals.replaced.most_common():
        table.add_row(f"replaced: {cause}", f"{times:,}")
    table.add_section()
    table.add_row("answers judged, as they should be", f"{totals.judged:,}")
    console.print(table)


def main() -> None:
    """Run all of it, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", action="store_true", help="train on the rows, with real servers")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="PIL")  # of damaged images
    console = Console(width=120, highlight=False)
    workspace = Path(tempfile.mkdtemp(prefix="fuzz-"))
    world.build_student(workspace / MODELS / "untrained")
    # A processor that was read is written with more keys, and so is the student's after its training.
    load_processor(workspace / MODELS / "untrained").save_pretrained(workspace / MODELS / "processor")
    totals = fuzz(workspace, given.rows, given.seed, workspace / MODELS / "processor")
    show(totals, console)
    if given.step:
        learn(workspace, totals, given.seed)
        write_settings(workspace, totals)
        run, output = train(workspace)
        show_step(totals, run, output, console)
        show_verdicts(totals, run, console)
    for fault in totals.faults:
        console.print(f"fault: {fault[:400]}", markup=False)
    console.print(f"{len(totals.faults)} faults" + (f"; the files are in {workspace}" if totals.faults else ""))
    if totals.faults:
        raise SystemExit(1)
    shutil.rmtree(workspace)


if __name__ == "__main__":
    main()
