"""Finds the answer in the text of a response, and the right answers in a key."""

import json
import re

LONGEST = 2000  # characters of an answer; the rest is ignored
ANSWER_IS = re.compile(
    r"(?:\b(?:answer|option|choice)\s*(?:is|(?:would|must|should) be|:|-|=)"
    r"|\b(?:respuesta|réponse|antwort|risposta|resposta|ответ|jawaban(?:nya)?|đáp án)\s*"
    r"(?:(?:correcta|correcte|corretta|correta|finale?|đúng)\s+)?(?:es|est|ist|è|é|adalah|là|:|-)(?!\w)"
    r"|(?:答案|选项|答え|正解|정답)(?:应该|应)?(?:是|为|选|は|은|：|:)+)"
    r"\s*:?\s*",
    re.IGNORECASE,
)
BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(\d|[A-Za-z](?![A-Za-z]))|(?![A-Za-z]))")
HOPE = re.compile(r"I hope (?:it|this) is correct\.?$")  # Minerva's prompt ends its answers with it
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def without_thoughts(response: str) -> str:
    """Return the response after its `</think>`; empty if the thought never ends."""
    head, end, tail = response.rpartition("</think>")
    return tail if end else head + ("" if "<think>" in response else tail)


def marked_answer(response: str) -> str | None:
    r"""Return the answer that is marked: the last `<answer>`, or else the last `\boxed`; None if there is neither.

    An answer whose mark is cut off is empty.
    """
    text = without_thoughts(response)
    ends = [mark.start() for mark in re.finditer("</answer>", text, re.IGNORECASE)][-1:]
    starts = [mark.end() for mark in re.finditer("<answer>", text, re.IGNORECASE) if ends and mark.end() <= ends[0]]
    if starts:
        last = text[starts[-1] : ends[0]].strip()
        inner = _boxed(last)
        return inner if inner is not None else last
    return _boxed(text)


def final_answer(response: str) -> str:
    """Return the marked answer.

    Without a mark, return what follows "answer is", "option:" or the like in the last line, or that whole line.
    """
    marked = marked_answer(response)
    if marked is not None:
        return marked[:LONGEST]
    lines = [line.strip() for line in without_thoughts(response).splitlines() if line.strip()]
    if not lines:
        return ""
    return ANSWER_IS.split(_unemphasised(HOPE.sub("", lines[-1]).rstrip()))[-1].strip()[:LONGEST].lstrip("*_# ")


def _unemphasised(line: str) -> str:
    """Return the line without its last `**` if no word follows."""
    head, mark, tail = line.rpartition("**")
    return line if not mark or re.search(r"\w", tail) else head + tail


def gold_answers(key: str) -> list[str]:
    """Return the right answers of a key: one, or several if the key is a JSON list of texts."""
    if key.lstrip().startswith("["):
        try:
            golds = json.loads(key)
        except ValueError:  # for example an interval
            return [key]
        if isinstance(golds, list) and golds and all(isinstance(gold, str) for gold in golds):
            return golds
    return [key]


def _boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\boxed4`; empty if it does not end. Braces may nest."""
    found = None
    for found in BOXED.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    if found[1] is not None:
        return found[1]
    depth = 0
    for sign in BRACE.finditer(text, found.end() - 1):
        depth += {"{": 1, "}": -1}.get(sign[0], 0)
        if depth == 0:
            return text[found.end() : sign.start()].strip()
    return ""
