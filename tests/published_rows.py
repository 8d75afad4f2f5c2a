"""Small parquet files in the published columns of the multimodal benchmarks, with planted answers of known score.

Columns and types are those of each data set's card; LogicVista's, VisuLogic's and MMStar's are those that lmms-eval
reads. Texts and images are made up. The scores were worked out by hand from each benchmark's rule, not by running it.
"""

import base64
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_prompts import PICTURE, png
from datasets import Dataset, Features, Image, List, Value

from mmopd.config.suite import Benchmark

TEXT, NUMBER, TEXTS, IMAGE = Value("string"), Value("int64"), List(Value("string")), Image()
THOUGHT = "<think>Perhaps it is A, or 7. Let me look again.</think>\n"  # what it says must not count
CUT = "<think>Let me look at the picture again, from the"  # a response that reached the limit of tokens
IDS = ("id", "question_id", "questionId")
ARCHIVE = "hub/datasets--VisuLogic--VisuLogic"  # below HF_HOME


class Case(NamedTuple):
    """A row without its question, the student's answer, and its score from 0 to 1; None if it does not count.

    `hidden`: after a thought lmms-eval no longer finds the answer. `second`: the score by OpenMMReasoner's rule, where
    it differs.
    """

    row: Mapping[str, Any]
    answer: str
    score: float | None
    hidden: bool = False
    second: float | None = None


@dataclass(frozen=True)
class Published:
    """The columns of a benchmark, the values that all its rows share, and its cases."""

    columns: Mapping[str, Any]
    shared: Mapping[str, Any]
    cases: Sequence[Case]
    prefix: str = ""  # of each question

    def score(self, thinks: bool) -> float:
        """Return the score on 0-100, of a student whose answers come after a thought or not."""
        counted = [0 if case.hidden and thinks else case.score for case in self.cases if case.score is not None]
        return 100 * sum(counted) / len(counted)

    def second(self) -> float:
        """Return the score by OpenMMReasoner's rule."""
        verdicts = [case.score if case.second is None else case.second for case in self.cases]
        return 100 * sum(verdict or 0 for verdict in verdicts) / len(verdicts)


def letter(gold: str, **more: Any) -> dict[str, Any]:
    return {"answer": gold, **more}


OPTIONS = ["1", "2", "3", "4", "5"]
MATHVISION = Published(
    {"id": TEXT, "question": TEXT, "options": TEXTS, "image": TEXT, "decoded_image": IMAGE}
    | {"answer": TEXT, "solution": TEXT, "level": NUMBER, "subject": TEXT},
    {"image": "images/1.jpg", "decoded_image": PICTURE, "solution": None, "level": 3, "subject": "counting"},
    [
        Case(letter("B", options=OPTIONS), r"So it is \boxed{B}.", 1),
        Case(letter("B", options=OPTIONS), r"\boxed{2}", 1),  # the option's value
        Case(letter("12", options=[]), "The answer is 12.", 1),
        Case(letter("0.5", options=[]), r"\boxed{\frac{1}{2}}", 1),
        Case(letter("C", options=OPTIONS), r"\boxed{D}", 0),
        Case(letter("12", options=[]), r"\boxed{13}", 0),
        Case(letter("A", options=OPTIONS), "I cannot see the picture.", 0),
        Case(letter("A", options=OPTIONS), CUT, 0),
    ],
)
DYNAMATH = Published(
    {"id": TEXT, "question_id": TEXT, "question": TEXT, "image": TEXT, "decoded_image": IMAGE}
    | {"ground_truth": TEXT, "answer_type": TEXT, "subject": TEXT, "knowledge_level": TEXT},
    {"image": "images/1.png", "decoded_image": PICTURE, "answer_type": "float", "subject": "algebra"},
    [  # two variants of each question: the average is over questions of equal size
        Case({"id": "0", "ground_truth": "0.5"}, r"<answer>$\frac{1}{2}$</answer>", 1),
        Case({"id": "0", "ground_truth": "0.5"}, "<answer>0.7</answer>", 0),
        Case({"id": "1", "ground_truth": "B"}, "<answer>B</answer>", 1),
        Case({"id": "1", "ground_truth": "C"}, "<answer>(C) the third</answer>", 1),
        Case({"id": "2", "ground_truth": "3"}, r"\boxed{3}", 1),
        Case({"id": "2", "ground_truth": "3"}, "I count three of them.", 0),
        Case({"id": "3", "ground_truth": "A"}, "The answer is A", 0),  # not in <answer> or \boxed
        Case({"id": "3", "ground_truth": "7"}, CUT, 0),
        Case({"id": "4", "ground_truth": "Brown"}, "<answer>Blue</answer>", 1, second=0),  # both begin with B
        Case({"id": "4", "ground_truth": "BC = 5"}, r"\boxed{5}", 1),
    ],
)
WEMATH = Published(
    {"ID": TEXT, "split": TEXT, "knowledge concept": TEXT, "question": TEXT, "option": TEXT, "answer": TEXT}
    | {"image_path": IMAGE, "key": TEXT, "question number": NUMBER, "knowledge concept description": TEXT},
    {"split": "testmini", "knowledge concept": "area", "option": "A. 1; B. 2; C. 3; D. 4", "image_path": PICTURE}
    | {"question number": 1, "knowledge concept description": "the area of a square"},
    [
        Case(letter("B", ID="1", key="2steps_1"), "<answer>B</answer>", 1),
        Case(letter("C", ID="1", key="2steps_2"), r"\boxed{C}", 1),
        Case(letter("D", ID="1", key="2steps_multi"), "<answer>D. 4</answer>", 1),
        Case(letter("A", ID="2", key="3steps_1"), "<answer>B</answer>", 0),
        Case(letter("A", ID="2", key="3steps_2"), "It is A", 0),  # not in <answer> or \boxed
        Case(letter("A", ID="2", key="3steps_3"), "<answer>(A)</answer>", 1),
        Case(letter("A", ID="2", key="3steps_multi"), CUT, 0),
    ],
)
LOGICVISTA = Published(
    {"question": TEXT, "image": IMAGE, "answer": TEXT},
    {"image": PICTURE},
    [
        Case(letter("B"), "<answer>B</answer>", 1),
        Case(letter("B"), "<answer>(B) the circle</answer>", 1),
        Case(letter("C"), "<answer>D</answer>", 0),
        Case(letter("D"), "The answer is D", 0),  # not in <answer> or \boxed
        Case(letter("B, D"), "<answer>B</answer>", 1, second=0),  # half of the key: lmms-eval reads its first letter
        Case(letter("B, D"), "<answer>B, D</answer>", 1),
        Case(letter("A"), CUT, 0),
    ],
)
VISULOGIC = Published(
    {"image_path": TEXT, "question": TEXT, "label": TEXT, "id": TEXT},
    {"image_path": "images/0.png"},
    [
        Case({"label": "B"}, "B", 1),
        Case({"label": "C"}, "<answer>C</answer>", 1),
        Case({"label": "D"}, r"\boxed{D}", 1),
        Case({"label": "A"}, "The answer is (A).", 1),
        Case({"label": "B"}, "C", 0),
        Case({"label": "A"}, "It is the first one.", 0),
        Case({"label": "B"}, CUT, 0),
    ],
)
AI2D = Published(
    {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": IMAGE},
    {"options": ["leaf", "root", "stem"], "image": PICTURE},
    [
        Case(letter("1"), "B", 1),
        Case(letter("1"), "B. root", 1, hidden=True),  # lmms-eval looks for `B.` before it removes the thought
        Case(letter("1"), "(b)", 1),  # neither case nor punctuation counts
        Case(letter("1"), "C", 0),
        Case(letter("1"), "root", 0),
        Case(letter("1"), "The answer is B", 0),
        Case(letter("1"), CUT, 0),
    ],
)
CHARTQA = Published(
    {"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE},
    {"image": PICTURE},
    [
        Case(letter("14", type="human_test"), "14", 1),
        Case(letter("14", type="human_test"), "14.5", 1),  # within 5 %
        Case(letter("Blue", type="human_test"), "blue", 1),
        Case(letter("14", type="human_test"), "16", 0),
        Case(letter("14", type="human_test"), "The answer is 14", 0),
        Case(letter("14", type="human_test"), CUT, 0),
        Case(letter("9", type="augmented_test"), "3", None),
        Case(letter("9", type="augmented_test"), "9", None),
    ],
)
DOCVQA = Published(
    {"questionId": TEXT, "question": TEXT, "question_types": TEXTS, "image": IMAGE, "docId": NUMBER}
    | {"ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT, "answers": TEXTS, "data_split": TEXT},
    {"question_types": ["layout"], "image": PICTURE, "docId": 7, "ucsf_document_id": "x", "ucsf_document_page_no": "1"}
    | {"data_split": "val"},
    [
        Case({"answers": ["1999"]}, "1999", 1),
        Case({"answers": ["03/1999", "March 1999"]}, "march 1999", 1),
        Case({"answers": ["1999"]}, "1998", 0.75),  # one edit of four
        Case({"answers": ["1999"]}, "2004", 0),
        Case({"answers": ["1999"]}, "The year is 1999", 0),  # more than half of it are edits
        Case({"answers": ["1999"]}, CUT, 0),
    ],
)
INFOVQA = Published(
    {"questionId": TEXT, "question": TEXT, "answers": TEXTS, "answer_type": TEXTS, "image": IMAGE, "image_url": TEXT}
    | {"operation/reasoning": TEXTS, "ocr": TEXT, "data_split": TEXT},
    {"answer_type": ["single span"], "image": PICTURE, "image_url": "u", "operation/reasoning": [], "ocr": "[]"}
    | {"data_split": "val"},
    [
        Case({"answers": ["Canada"]}, "canada", 1),
        Case({"answers": ["42 million", "42m"]}, "42m", 1),
        Case({"answers": ["42 million"]}, "about 42 million", 0.625),  # six edits of sixteen
        Case({"answers": ["Canada"]}, "Mexico", 0),
        Case({"answers": ["Canada"]}, CUT, 0),
    ],
)
FIRST_IMAGE = "<image 1> "
MMSTAR = Published(
    {"index": NUMBER, "question": TEXT, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT, "answer": TEXT, "category": TEXT}
    | {"l2_category": TEXT, "image": TEXT},
    {"index": 1, "A": "a cat", "B": "a dog", "C": "a cow", "D": "a hen", "image": base64.b64encode(png()).decode()}
    | {"category": "coarse perception"},
    [  # the average is over categories of equal size
        Case(letter("B", l2_category="image scene"), "B", 1),
        Case(letter("C", l2_category="image scene"), "The answer is (C).", 1),
        Case(letter("D", l2_category="geometry"), "A", 0),
        Case(letter("A", l2_category="geometry"), CUT, 0),
    ],
    FIRST_IMAGE,
)
IMAGES = {f"image_{i}": IMAGE for i in range(1, 8)}
CHOICE, OPEN = {"question_type": "multiple-choice"}, {"question_type": "open"}
MMMU = Published(
    {"id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT, **IMAGES, "img_type": TEXT, "answer": TEXT}
    | {"topic_difficulty": TEXT, "question_type": TEXT, "subfield": TEXT},
    {"options": "['a cat', 'a dog', 'a cow']", "image_1": PICTURE, "subfield": "Drawing"},
    [  # none that cannot be read: such an answer gets a random letter, as in MMMU's own code
        Case(letter("A", id="validation_Art_1", **CHOICE), "A", 1),
        Case(letter("B", id="validation_Art_2", **CHOICE), "(B)", 1),
        Case(letter("B", id="validation_Music_1", **CHOICE), "The answer is B.", 1),
        Case(letter("C", id="validation_Music_2", **CHOICE), "It shows, if I look at it, a cow.", 1),
        Case(letter("A", id="validation_Finance_1", **CHOICE), "B", 0),
        Case(letter("12", id="validation_Finance_2", **OPEN), "The result is 12.", 1),
        Case(letter("12", id="validation_Finance_3", **OPEN), "13", 0),
        Case(letter("Paris", id="validation_Finance_4", **OPEN), CUT, 0),
    ],
    FIRST_IMAGE,
)
MMMU_PRO = Published(
    {"id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT, **IMAGES, "img_type": TEXT, "answer": TEXT}
    | {"topic_difficulty": TEXT, "subject": TEXT},
    {"options": str([f"{i} cats" for i in range(10)]), "image_1": PICTURE, "subject": "Art"},
    [
        Case(letter("A", id="test_Art_1"), "A", 1),
        Case(letter("J", id="test_Art_2"), "(J)", 1),
        Case(letter("B", id="test_Art_3"), "The answer is B.", 1),
        Case(letter("C", id="test_Art_4"), "D", 0),
    ],
    FIRST_IMAGE,
)
READ = {"dataset": "IIIT5K", "question_type": "Regular Text Recognition"}
OCRBENCH = Published(
    {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": IMAGE},
    {"image": PICTURE},
    [
        Case({"answer": ["STOP"], **READ}, "It says Stop.", 1),
        Case({"answer": ["$12", "12 dollars"], **READ}, "12 dollars", 1),
        Case(
            {
                "answer": ["a ^ 2"],
                "dataset": "HME100k",
                "question_type": "Handwritten Mathematical Expression Recognition",
            },
            "a^2",
            1,
        ),
        Case({"answer": ["STOP"], **READ}, "GO", 0),
        Case({"answer": ["1999"], **READ}, "1 999", 0),
        Case({"answer": ["STOP"], **READ}, CUT, 0),
    ],
)
# By the column of eval/paper-mm.yaml and eval/more-mm.yaml.
PUBLISHED: Mapping[str, Published] = {
    "MathVision": MATHVISION,
    "DynaMath": DYNAMATH,
    "WeMath": WEMATH,
    "LogicVista": LOGICVISTA,
    "VisuLogic": VISULOGIC,
    "AI2D": AI2D,
    "ChartQA": CHARTQA,
    "DocVQA": DOCVQA,
    "InfoVQA": INFOVQA,
    "MMStar": MMSTAR,
    "MMMU": MMMU,
    "MMMU-Pro": MMMU_PRO,
    "OCRBench": OCRBENCH,
}


def write(benchmarks: Sequence[Benchmark], folder: Path) -> tuple[Benchmark, ...]:
    """Write the rows of each benchmark, and return the benchmarks with them as local data."""
    local = []
    for benchmark in benchmarks:
        published = PUBLISHED[benchmark.column]
        rows = [
            {
                **published.shared,
                **dict.fromkeys(IDS, str(i)),
                **case.row,
                "question": published.prefix + ask(benchmark.column, i),
            }
            for i, case in enumerate(published.cases)
        ]
        complete = [{key: row.get(key) for key in published.columns} for row in rows]
        path = folder / f"{benchmark.column}.parquet"
        Dataset.from_list(complete, features=Features(published.columns)).to_parquet(path)
        local.append(benchmark.model_copy(update={"data": path}))
    return tuple(local)


def write_archive(hub: Path) -> None:
    """Write VisuLogic's images into a cache of the hub (`HF_HOME`), where lmms-eval looks for them."""
    snapshot = hub / ARCHIVE / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (hub / ARCHIVE / "refs").mkdir()
    (hub / ARCHIVE / "refs" / "main").write_text("0", encoding="utf-8")
    with zipfile.ZipFile(snapshot / "images.zip", "w") as archive:
        archive.writestr("images/0.png", png())


def ask(column: str, i: int) -> str:
    return f"What does the picture of case {i} of {column} show?"


def answer(prompt: str, thinks: bool) -> str:
    """Return the planted answer to a prompt, after a thought if the student thinks."""
    found = re.search(r"picture of case (\d+) of (\S+) show", prompt)
    assert found, prompt
    text = PUBLISHED[found[2]].cases[int(found[1])].answer
    return THOUGHT + text if thinks and text != CUT else text
