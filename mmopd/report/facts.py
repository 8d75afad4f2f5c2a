"""The facts of a run at the head of the report, and its numbers at the end of training, each with an explanation."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mmopd.report.run_files import short
from mmopd.report.verdict import last_mean

T = TypeVar("T")


def value_of(recipe: Mapping[str, Any], key: str, kind: type[T] | tuple[type[T], ...]) -> T | None:
    """Return the value of a dotted key; None if it is missing or of another kind, as in a damaged recipe."""
    found: Any = recipe
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, kind) and not isinstance(found, bool) else None


def facts(recipe: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return term, meaning, value and details of each setting at the head of the page; nothing without a recipe."""
    if not recipe:
        return []

    def text(key: str, missing: str = "–") -> str:
        value = value_of(recipe, key, (str, int, float))
        return missing if value is None else short(str(value))

    ranks = text("train.ranks")
    balance = isinstance(recipe.get("algorithm"), dict) and recipe["algorithm"].get("balance")
    margin = isinstance(recipe.get("algorithm"), dict) and recipe["algorithm"].get("margin")
    direction = text("algorithm.margin.direction") if text("algorithm.margin.kind") == "shift" else ""
    rows = (
        ("Student", "The model that learns.", text("student.model"), ""),
        (
            "Objective",
            "What the student learns from: opd and exopd from its teachers' log-probs on its own responses, dense from "
            "the teachers' likeliest tokens, sft from the teachers' right answers, grpo from right and wrong alone.",
            text("algorithm.objective.kind", "opd"),
            "",
        ),
        ("Fleet", "The file that names the teachers, and the task and medium of each.", text("fleet", "none"), ""),
        ("Mixture", "The file that names the sources of prompts and their weights.", text("mixture"), ""),
        (
            "Rollout",
            "In each step the student samples several responses, a group, to each of some prompts.",
            f"{text('rollout.prompts')} prompts × {text('rollout.group')}",
            f"responses a step, temperature {text('rollout.temperature')}",
        ),
        (
            "Training",
            "Steps done of those that the recipe asks for. A rank is a process that trains. lr is the learning rate.",
            f"{len(metrics):,} of {text('train.steps')} steps",
            f"{ranks} rank{'' if ranks == '1' else 's'}, {text('train.dtype')}, lr {text('train.lr')}",
        ),
        (
            "Balance",
            "How right and wrong responses are balanced in the loss: the ratio that is kept, in each group or over the "
            "whole step.",
            f"{text('algorithm.balance.scope')}, {text('algorithm.balance.ratio')} : 1" if balance else "off",
            "right to wrong" if balance else "",
        ),
        (
            "Margin",
            "Calibration of the teachers' scores: right responses are to have a return that is δ higher than that of "
            "wrong ones.",
            f"{text('algorithm.margin.kind')}, δ = {text('algorithm.margin.delta')}" if margin else "off",
            ", ".join(filter(None, [text("algorithm.margin.scope"), text("algorithm.margin.mode"), direction]))
            if margin
            else "",
        ),
        ("Seed", "Of all random choices of the run.", text("seed"), ""),
    )
    return [dict(zip(("term", "meaning", "value", "small"), row, strict=True)) for row in rows]


def at_the_end(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return term, meaning and value of the numbers at the end of training."""
    skipped = sum(row.get("skipped_updates") or 0 for row in metrics)
    rows = (
        ("Right answers", "Share of the sampled responses that could be judged.", "correct/sampled", ".0%"),
        ("Reverse KL", "Student minus teacher, nats per token; 0 if both agree.", "reverse_kl", ".3f"),
        ("Response length", "Mean number of tokens.", "response_length", ",.1f"),
        ("Cut answers", "Share of the responses that ended at rollout.max_tokens.", "truncated", ".1%"),
        ("Unknown", "Share of the responses that the verifier could not judge.", "share/unknown", ".1%"),
        ("Without a score", "Share of the responses that no teacher scored.", "share/absent", ".1%"),
        ("Learning rate", "Size of an update.", "lr", ".2g"),
    )
    found = [
        {"term": term, "meaning": meaning, "value": format(value, form).replace("%", " %")}
        for term, meaning, name, form in rows
        if (value := last_mean(metrics, name)) is not None
    ]
    if any("skipped_updates" in row for row in metrics):
        meaning = "Updates of the whole run that were left out, because loss or gradient was not finite."
        found.append({"term": "Skipped updates", "meaning": meaning, "value": f"{skipped:,.0f}"})
    return found
