"""GLUE's and SQuAD's tasks for experiments on encoders: rows, heads, scores, and the papers' settings filled in.

    config = glue.filled(config, TASKS, ("batch", "length"))          # fields that are None, as the paper has them
    raw = glue.read(config.data, config.task, ("train", "dev"))
    rows = glue.rows(config.task, tokenizer, raw["dev"], config.length)
    scores = glue.quality(config.task, model, rows, raw["dev"])       # {"matthews": ...}

A task is a name of `jaxformers.data.glue.TASKS`, or "squad" or "squad_v2". None is none of these: texts with a class.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import sentences
from jaxformers import metrics
from jaxformers.atomic import write_json_atomic
from jaxformers.data import glue, squad
from jaxformers.data.tokenizers import Tokenizer
from jaxformers.losses import sample_losses

Config = TypeVar("Config")
SQUAD = {"squad": ("train-v1.1", "dev-v1.1"), "squad_v2": ("train-v2.0", "dev-v2.0")}
SQUAD_ROWS = {"squad": 87_599, "squad_v2": 130_319}  # questions to train on; their windows are a few more
TARGETS = ("labels", "start_positions", "end_positions")
STRIDE = 128  # of SQuAD's windows, in tokens


@dataclasses.dataclass(frozen=True)
class Rows:
    """``data``: the model's inputs and targets by name. ``windows``: where they come from, of SQuAD."""

    data: dict[str, np.ndarray]
    windows: squad.Windows | None = None


def is_span(task: str | None) -> bool:
    """Is it SQuAD? Raises ValueError for a name that is no task."""
    if task is None or task in SQUAD:
        return task is not None
    if task not in glue.TASKS:
        raise ValueError(f"task: expected one of {', '.join((*glue.TASKS, *SQUAD))}, got {task!r}")
    return False


def filled(config: Config, settings: Mapping[str, Mapping[str, Any]], needed: Sequence[str]) -> Config:
    """``config`` with ``settings[config.task]`` where its fields are None. Raises ValueError naming a field of
    ``needed`` that is None still."""
    is_span(config.task)
    own = settings.get(config.task, {})
    config = dataclasses.replace(config, **{n: value for n, value in own.items() if getattr(config, n) is None})
    lacking = [name for name in needed if getattr(config, name) is None]
    if lacking:
        known = ", ".join(settings)
        raise ValueError(f"{lacking[0]}: give it; the paper's is known for the tasks {known}, not for {config.task}")
    return config


def steps_of(steps: int | None, epochs: float, rows: int, batch: int) -> int:
    """``steps``, or those of so many passes over the rows."""
    return math.ceil(rows / batch) * epochs if steps is None else steps


def classes_only(task: str | None, system: str) -> None:
    """Raises ValueError for SQuAD, in an experiment whose losses are of classes and scores."""
    if is_span(task):
        others = "axformer and essential_sparsity"
        raise ValueError(f"task: {system} distils classes and scores, {task} has neither; it runs in {others}")


def rows_of(task: str) -> int:
    """Of the task's training set, as published."""
    return SQUAD_ROWS[task] if is_span(task) else glue.TASKS[task].rows


# ---- data ------------------------------------------------------------------------------------------------------------


def read(
    directory: Path | None, task: str, parts: Sequence[str], rows: int | None = None, *, held_out: float = 0.15,
    out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """{part: (texts, labels), or a list of questions}, of "train" and "dev", or of "train", "val" and "test".

    The latter are for what selects on one part and reports on another: GLUE publishes no labels of its test sets, so
    that "test" is the development set, and "val" a share ``held_out`` of the training set (of SQuAD's of its contexts),
    always the same rows, whose numbers are written to ``out``/split.json. ``rows``: of each table at most.
    """
    if directory is None:
        where = squad.WHERE if is_span(task) else glue.WHERE
        raise ValueError(f"data: {task} is not here; give its directory: {where}")
    tables = {part: _table(directory, task, part, rows) for part in ("train", "dev")}
    if "val" not in parts:
        return tables
    of = _contexts(tables["train"])
    n = int(of.max()) + 1
    if n < 2:
        raise ValueError("data: one training row (or context) cannot be split; at least two are needed")
    held = np.random.default_rng(0).permutation(n)[: max(1, round(n * held_out))]
    val, train = (np.flatnonzero(np.isin(of, held, invert=away)) for away in (False, True))
    if out is not None:
        write_json_atomic(out / "split.json", {"val": val.tolist()})
    return {"train": _taken(tables["train"], train), "val": _taken(tables["train"], val), "test": tables["dev"]}


def _table(directory: Path, task: str, part: str, rows: int | None) -> Any:
    if not is_span(task):
        return glue.read_glue(directory, task, part, rows)
    stem = SQUAD[task][part == "dev"]
    names = [f"{name}.json{gz}" for name in (stem, part) for gz in ("", ".gz")]
    path = next((Path(directory) / name for name in names if (Path(directory) / name).is_file()), None)
    if path is None:
        raise ValueError(f"data: {directory} has none of {', '.join(names)}; {squad.WHERE}")
    return squad.read_squad(path, rows)


def _contexts(part: Any) -> np.ndarray:
    """The number of each row's context: all questions about one stay together; of GLUE the row's own."""
    if isinstance(part, list):
        return np.unique([q.context for q in part], return_inverse=True)[1]
    return np.arange(len(part[1]))


def _taken(part: Any, index: np.ndarray) -> Any:
    if isinstance(part, list):
        return [part[i] for i in index]
    return [part[0][i] for i in index], part[1][index]


def texts_of(part: Any) -> list[str]:
    """All texts of a part, to train a vocabulary on."""
    if part and isinstance(part, list):
        return [text for q in part for text in (q.text, q.context)]
    return [text for item in part[0] for text in ([item] if isinstance(item, str) else item)]


def rows(
    task: str | None, tokenizer: Tokenizer, part: Any, length: int, *, padded: bool = True, outputs: Any = None,
    stride: int = STRIDE,
) -> Rows:  # fmt: skip
    """A part as tokens, with its targets. ``outputs``: the model's output of each label (see `glue.outputs_of`)."""
    if not is_span(task):
        if outputs is not None and len(outputs) > 1:
            part = part[0], np.asarray(outputs, np.int32)[part[1]]
        return Rows(sentences.encoded(tokenizer, part, length, padded=padded))
    found = squad.squad_windows(tokenizer, part, length=length, stride=min(stride, length))
    return Rows({**found.inputs, **found.targets}, found)


# ---- models ----------------------------------------------------------------------------------------------------------


def head_of(task: str | None, part: Any) -> dict[str, Any]:
    """What `jaxformers.load` needs to give a model the task's head."""
    if is_span(task):
        return {"head": "question_answering"}
    labels = int(part[1].max()) + 1 if task is None else glue.TASKS[task].outputs
    return {"head": "sequence_classification", "num_labels": labels}


def outputs_of(task: str | None, model: nnx.Module) -> np.ndarray | None:
    """Which output of a fine-tuned checkpoint stands for each label; None where there are no labels to look for."""
    if task is None or is_span(task):
        return None
    names = json.loads(model.config.hf).get("id2label")
    return glue.outputs_of(task, names or {i: f"LABEL_{i}" for i in range(model.config.num_labels)})


def loss_of(task: str | None) -> Any:
    """The objective of training on a task."""
    return sentences.label_loss if task is None else loss


def loss(apply: Any, params: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, Any]]:
    """The objective of any of the tasks: cross-entropy of classes or of a span's ends, squared error of scores."""
    inputs = {name: value for name, value in batch.items() if name not in TARGETS}
    return sample_losses(apply(params, inputs, rngs=key), batch).mean(), {}


def score_names(task: str | None) -> tuple[str, ...]:
    """The scores of a task."""
    return ("f1", "exact_match") if is_span(task) else ("accuracy",) if task is None else glue.TASKS[task].metrics


def main_score(task: str | None) -> str:
    """The one that a task is told by."""
    return score_names(task)[0]


def scored(
    task: str | None, logits: np.ndarray, rows: Rows, raw: Any, outputs: np.ndarray | None = None
) -> dict[str, float]:
    """The task's scores of logits, the part that was read being ``raw``."""
    if is_span(task):
        threshold = 0.0 if task == "squad_v2" else None
        found = squad.best_spans(rows.windows, raw, logits)
        return squad.squad_scores(squad.chosen_answers(found, threshold), raw)
    if task is None:
        return {"accuracy": metrics.accuracy(raw[1], logits.argmax(-1))}
    return glue.glue_scores(task, logits if outputs is None else logits[:, outputs], raw[1])


def quality(
    task: str | None, model: nnx.Module, rows: Rows, raw: Any, *, batch: int, outputs: np.ndarray | None = None
) -> dict[str, float]:
    """The task's scores of a model, evaluated so many rows at a time."""
    apply, params = jf.functional(model)
    run = jax.jit(lambda params, batch: apply(params, batch).logits)
    inputs = {name: x for name, x in rows.data.items() if name not in TARGETS}
    n = len(inputs["input_ids"])
    parts = [run(params, {k: x[i : i + batch] for k, x in inputs.items()}) for i in range(0, n, batch)]
    return scored(task, np.concatenate([np.asarray(p) for p in parts]), rows, raw, outputs)
