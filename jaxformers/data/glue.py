"""GLUE (arXiv 1804.07461): its nine tasks as data, readers of its tables, and its scores.

    texts, labels = read_glue("GLUE/MRPC", "mrpc", "train")       # pairs of sentences, int32
    glue_scores("mrpc", logits, labels)                           # {"accuracy": ..., "f1": ...}

Labels have the numbers that Hugging Face's `nyu-mll/glue` and tensorflow-datasets give them, which published
checkpoints follow as a rule; :func:`outputs_of` looks into a checkpoint's `id2label`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from jaxformers import metrics
from jaxformers.data.text import read_records, read_text

Texts = list[str] | list[tuple[str, str]]

WHERE = (
    "download it from gluebenchmark.com/tasks and unpack it, or write the splits of Hugging Face's nyu-mll/glue (or of "
    'tfds.data_source("glue/...")) as train.jsonl and validation.jsonl'
)


@dataclasses.dataclass(frozen=True)
class Task:
    """``name``: GLUE's own, and its archive's directory. ``texts``, ``label``: columns of the official tables, with
    their ``header`` where the file has none; ``columns``: the texts' names at Hugging Face, where the label is "label".
    ``labels``: names by number, none for a regression. ``rows``: of the training set. ``dev``: the development table;
    ``validation``: its name at Hugging Face. ``gaps``: the table is known to hold rows that a line break cuts."""

    name: str
    texts: tuple[str, ...]
    label: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: int
    dev: str = "dev"
    validation: str = "validation"
    header: tuple[str, ...] | None = None
    gaps: bool = False

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def outputs(self) -> int:
        """Of the classifier: one a label, one for a regression."""
        return max(len(self.labels), 1)


_PAIR, _RTE = ("sentence1", "sentence2"), ("entailment", "not_entailment")
_MNLI = ("MNLI", _PAIR, "gold_label", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"))
TASKS = {
    "cola": Task(
        "CoLA", ("sentence",), "label", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), 8551,
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": Task("SST-2", ("sentence",), "label", ("sentence",), ("negative", "positive"), ("accuracy",), 67_349),
    "mrpc": Task(
        "MRPC", ("#1 String", "#2 String"), "Quality", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), 3668
    ),
    "qqp": Task(
        "QQP", ("question1", "question2"), "is_duplicate", ("question1", "question2"), ("not_duplicate", "duplicate"),
        ("accuracy", "f1"), 363_846, gaps=True,
    ),
    "stsb": Task("STS-B", _PAIR, "score", _PAIR, (), ("pearson", "spearman"), 5749),
    "mnli": Task(*_MNLI, ("accuracy",), 392_702, "dev_matched", "validation_matched"),
    "mnli_mismatched": Task(*_MNLI, ("accuracy",), 392_702, "dev_mismatched", "validation_mismatched"),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ("question", "sentence"), _RTE, ("accuracy",), 104_743),
    "rte": Task("RTE", _PAIR, "label", _PAIR, _RTE, ("accuracy",), 2490),
    "wnli": Task("WNLI", _PAIR, "label", _PAIR, ("not_entailment", "entailment"), ("accuracy",), 635),
}  # fmt: skip


def glue_task(task: str) -> Task:
    """The task of a name: a key of TASKS. Raises ValueError for any other."""
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return TASKS[task]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_glue(directory: str | PathLike, task: str, part: str, rows: int | None = None) -> tuple[Texts, np.ndarray]:
    """(texts, or pairs of them; labels) of a task's "train" or "dev" table, the first ``rows`` of it at most.

    ``directory`` holds the official table (train.tsv, dev.tsv; dev_matched.tsv and dev_mismatched.tsv of MNLI), or one
    written from Hugging Face's data set (train.jsonl, validation.jsonl), each perhaps with .gz; or it holds the
    directories of all tasks by GLUE's names. In the official tables a quotation mark is a plain character. Labels are
    int32, for STS-B scores of 0 to 5 in float32.

    Raises ValueError naming the file, and the line: a table or column that is missing, a row with more or fewer cells
    than the header (those of QQP with fewer, which its official file is known to hold, are left out), a label that the
    task does not have. "test" is read where its labels are known; those of GLUE's test sets are not published, which is
    an error.
    """
    found = glue_task(task)
    path = _table(Path(directory), found, part)
    if any(suffix == ".tsv" for suffix in path.suffixes):
        numbered = _lines(path, found)
    else:
        numbered = ((f"{path}: row {i}", row) for i, row in enumerate(read_records(path), start=1))
    return _collected(itertools.islice(numbered, rows), found, str(path))


def glue_rows(records: Iterable[Mapping[str, Any]], task: str, rows: int | None = None) -> tuple[Texts, np.ndarray]:
    """As :func:`read_glue`, of rows {column: value} that something else has read, the columns named as at Hugging Face.

    Takes a split of `datasets.load_dataset("nyu-mll/glue", task)`, or `tfds.data_source("glue/sst2", split="train")`,
    which needs no TensorFlow: its texts are bytes in UTF-8.
    """
    numbered = ((f"records: row {i}", row) for i, row in enumerate(records, start=1))
    return _collected(itertools.islice(numbered, rows), glue_task(task), "records")


def _table(directory: Path, task: Task, part: str) -> Path:
    plain = () if task.dev == "dev_mismatched" else ("validation", "val", "dev")
    names = {
        "train": ("train.tsv", "train.jsonl"),
        "dev": (f"{task.dev}.tsv", *(f"{name}.jsonl" for name in dict.fromkeys((task.validation, *plain)))),
        "test": (f"{task.dev.replace('dev', 'test')}.tsv", "test.jsonl"),
    }
    if part not in names:
        raise ValueError(f"part: expected 'train', 'dev' or 'test', got {part!r}")
    if not directory.is_dir():
        raise ValueError(f"data: {directory} is no directory; for {task.name}, {WHERE}")
    if (directory / task.name).is_dir():
        directory = directory / task.name
    wanted = [f"{name}{gz}" for name in names[part] for gz in ("", ".gz")]
    path = next((directory / name for name in wanted if (directory / name).is_file()), None)
    if path is None:
        raise ValueError(f"data: {directory} has none of {', '.join(names[part])}; for {task.name}, {WHERE}")
    return path


def _lines(path: Path, task: Task) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row) of a table whose cells are parted by tabs, nothing quoted."""
    header = task.header
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        cells = line.split("\t")
        if header is None or (number == 1 and "sentence" in cells):  # CoLA's test table has a header
            header = tuple(cells)
        elif line and not (task.gaps and len(cells) < len(header)):
            if len(cells) != len(header):
                raise ValueError(f"{path}, line {number}: {len(cells)} cells, expected {len(header)}")
            yield f"{path}, line {number}", dict(zip(header, cells, strict=True))


def _collected(numbered: Iterable[tuple[str, Mapping[str, Any]]], task: Task, source: str) -> tuple[Texts, np.ndarray]:
    texts, labels, columns = [], [], None
    for where, row in numbered:
        if columns is None:
            columns = task.texts if task.texts[0] in row else task.columns
            label = task.label if task.label in row else "label"
        missing = [name for name in columns if name not in row]
        if missing:
            raise ValueError(f"{where}: no column {missing[0]!r} for {task.name}; it has {', '.join(map(repr, row))}")
        if label not in row:
            raise ValueError(f"{where}: no label; those of GLUE's test sets are not published, use the part 'dev'")
        cells = tuple(_text(row[name], name, where) for name in columns)
        texts.append(cells if len(cells) == 2 else cells[0])
        labels.append(_label(row[label], task, where))
    if not texts:
        raise ValueError(f"{source}: no rows")
    return texts, np.asarray(labels, np.float32 if task.regression else np.int32)


def _text(value: Any, name: str, where: str) -> str:
    value = value.decode() if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise ValueError(f"{where}: the {name} is {value!r}; expected a string")
    return value


def _label(value: Any, task: Task, where: str) -> int | float:
    value = value.decode() if isinstance(value, bytes) else value
    if value in task.labels:
        return task.labels.index(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number == -1:
        raise ValueError(f"{where}: the label is -1, not known; those of GLUE's test sets are not published, use 'dev'")
    if task.regression:
        if not 0 <= number <= 5:
            raise ValueError(f"{where}: the score is {value!r}; expected a number from 0 to 5")
        return number
    if number not in range(len(task.labels)):
        known = ", ".join(f"{i} or {name}" for i, name in enumerate(task.labels))
        raise ValueError(f"{where}: the label is {value!r}; {task.name} has {known}")
    return int(number)


# ---- checkpoints and scores ------------------------------------------------------------------------------------------


def outputs_of(task: str, id2label: Mapping[Any, str]) -> np.ndarray:
    """(labels,) int32: which output of a checkpoint stands for each of the task's labels, by its `id2label`.

    Case and hyphens do not count. Names that say nothing (LABEL_0, or numbers) are taken for the task's own order; a
    regression has one output. Raises ValueError where the outputs are of another number, or named otherwise.
    """
    found = glue_task(task)
    if len(id2label) != found.outputs:
        raise ValueError(f"task: {found.name} takes {found.outputs} outputs, the checkpoint has {len(id2label)}")
    plain = {int(i): str(name).lower().replace("-", "_").replace(" ", "_") for i, name in id2label.items()}
    if found.regression or all(name.removeprefix("label_") == str(i) for i, name in plain.items()):
        return np.arange(found.outputs, dtype=np.int32)
    by_name = {name: i for i, name in plain.items()}
    if set(by_name) != set(found.labels):
        told = ", ".join(map(str, id2label.values()))
        raise ValueError(f"task: {found.name} has {', '.join(found.labels)}, the checkpoint's outputs are {told}")
    return np.asarray([by_name[name] for name in found.labels], np.int32)


def glue_scores(task: str, logits: Any, labels: Any) -> dict[str, float]:
    """The task's metrics {name: value in -1..1} of logits (n, outputs) in the order of its labels, as GLUE scores them.

    "f1" is that of label 1; "matthews", "pearson" and "spearman" are correlations, 0 where a side is constant.
    Raises ValueError for logits of another shape.
    """
    found = glue_task(task)
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.shape != (len(labels), found.outputs):
        raise ValueError(f"logits: expected {(len(labels), found.outputs)} for {found.name}, got {logits.shape}")
    said = logits[:, 0] if found.regression else logits.argmax(-1)
    measures = {
        "accuracy": metrics.accuracy, "f1": lambda true, said: metrics.precision_recall_f1(true, said)[2],
        "matthews": metrics.matthews, "pearson": metrics.pearson, "spearman": metrics.spearman,
    }  # fmt: skip
    return {name: measures[name](labels, said) for name in found.metrics}
