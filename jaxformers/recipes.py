"""Chains of compressions, written down as data: each step's checkpoint, and after each what it weighs, costs and knows.

A recipe is a TOML file, or a list of dicts with the same entries:

    [[step]]
    method = "fusegpt"        # a name in recipe_steps.METHODS
    rate = 0.25               # what else that method takes

    [[step]]
    method = "gptq"
    bits = 4
    group_size = 128

GPTQ's own option `method` (gptq, rtn, ternary) is called `scheme` here, and that of `prune` is called `by`.

Every step works on the checkpoint that the one before has written, and writes its own beside its final name before it
is renamed: a run that was killed goes on after the last finished step, and one with other later steps keeps the first
ones. A directory's name ends in a checksum of all that led to it: the model's weights, the data, the seed, the steps.
"""

import dataclasses
import json
import logging
import shutil
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from jaxformers import hub
from jaxformers.atomic import write_json_atomic
from jaxformers.compress.sweep import fingerprint
from jaxformers.cost import cost, latency
from jaxformers.extras import require
from jaxformers.functional import functional
from jaxformers.recipe_data import calibration_of_file, evaluation_of, example_of
from jaxformers.recipe_steps import METHODS, Data

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report. ``bytes``: of the weights as stored, of packed ones their words and scales. ``macs``:
    multiply-adds of a forward pass of one sequence, and ``milliseconds`` its median time. ``quality``: perplexity, or
    what the given metric says; None without evaluation."""

    step: str
    parameters: int
    bytes: int
    macs: float
    milliseconds: float
    quality: float | None
    directory: str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """The model that comes out, and a row for the source and for each step. As text: a table."""

    model: nnx.Module = dataclasses.field(repr=False)
    rows: tuple[Row, ...]
    metric: str

    def __str__(self) -> str:
        table = Table(title="after each step", title_justify="left")
        for name in ("step", "parameters", "MB", "GMACs", "ms", self.metric):
            table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
        for r in self.rows:
            quality = "–" if r.quality is None else f"{r.quality:.4g}"
            numbers = (f"{r.parameters:,}", f"{r.bytes / 1e6:,.4g}", f"{r.macs / 1e9:,.4g}", f"{r.milliseconds:.4g}")
            table.add_row(r.step, *numbers, quality)
        console = Console(width=140)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


# ---- reading and running -------------------------------------------------------------------------------------------


def read_recipe(recipe: str | Path | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps of a recipe, checked. Raises ValueError naming the step, and what there is, for a method or an option
    that is not known, and for an option that cannot be."""
    if isinstance(recipe, str | Path):
        file = Path(recipe)
        try:
            told = tomllib.loads(file.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"recipe: {file} cannot be read as TOML ({error})") from None
        unknown = set(told) - {"step"}
        if unknown or not isinstance(told.get("step"), list):
            raise ValueError(f"recipe: {file} must hold [[step]] tables and nothing else, found {sorted(told)}")
        recipe = told["step"]
    steps = []
    for i, step in enumerate(recipe):
        if not isinstance(step, Mapping) or not isinstance(step.get("method"), str):
            raise ValueError(f"recipe: step {i} names no method; there are {', '.join(METHODS)}")
        options = {name: value for name, value in step.items() if name != "method"}
        if step["method"] == "gptq" and "scheme" in options:  # `method` names the step already
            options["method"] = options.pop("scheme")
        steps.append({"method": step["method"], "options": options})
        _check(i, **steps[-1])
    if not steps:
        raise ValueError("recipe: it has no steps")
    return steps


def _check(i: int, method: str, options: dict[str, Any]) -> None:
    if method not in METHODS:
        raise ValueError(f"recipe: step {i} has method {method!r}; there are {', '.join(METHODS)}")
    known = METHODS[method].options
    for name in options:
        if name not in known:
            raise ValueError(
                f"recipe: step {i}: {method} has no option {name!r}; it takes {', '.join(known) or 'none'}"
            )
    try:
        METHODS[method].check(dict(options))
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe: step {i}: {method}: {error}") from None


def run_recipe(
    model: str | Path,
    recipe: str | Path | Sequence[Mapping[str, Any]],
    out: str | Path,
    *,
    calibration: str | Path | np.ndarray | Mapping[str, np.ndarray] | None = None,
    evaluation: str | Path | np.ndarray | Mapping[str, np.ndarray] | None = None,
    metric: Callable[[nnx.Module], float] | None = None,
    metric_name: str = "quality",
    samples: int = 128,
    length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
) -> Report:
    """Compress the checkpoint ``model`` (directory or hub id) step by step into directories under ``out``.

    ``calibration``: what the steps measure on: token ids (sequences, length), the model's inputs by name (and "labels"
    of the rows, for steps that train), or a file: text, ``samples`` random windows of ``length`` tokens, cut to the
    model's positions; for a classifier of sequences a table with columns text (text2) and label, ``samples`` rows of
    it, each cut to ``length`` tokens; for any model an .npz of its inputs by name.

    ``evaluation``: for causal language models windows of token ids (n, length) or a text, whose perplexity is reported;
    for classifiers inputs by name with "labels", as arrays, an .npz, or (of sequences) a table, all of its rows:
    accuracy. ``metric(model) -> float``, called ``metric_name``, stands in their place. ``batch_size``: of the
    evaluation. ``seed``: of the draw of the calibration windows, and of each step's key.

    ``out`` receives a checkpoint per step, ``report.json`` (rewritten after each), and ``figure.png``: size against
    quality. Raises ValueError before anything is computed: for a recipe that cannot be read or names what is not known,
    a step that needs calibration data (or their labels) where there are none, an evaluation that is not defined for
    the model.
    """
    steps, out = read_recipe(recipe), Path(out)
    for i, step in enumerate(steps):
        if calibration is None and METHODS[step["method"]].calibrated(step["options"]):
            raise ValueError(f"calibration: step {i}, {step['method']}, needs data; give token ids or a file")
    if metric is not None and evaluation is not None:
        raise ValueError("evaluation, metric: give one of them")
    require("matplotlib", extra="plot")
    current = hub.load(model)
    if isinstance(calibration, str | Path):
        calibration = calibration_of_file(current, Path(calibration), samples=samples, length=length, seed=seed)
    labels = None
    if isinstance(calibration, Mapping):
        calibration = dict(calibration)
        labels = calibration.pop("labels", None)
    for i, step in enumerate(steps):
        if METHODS[step["method"]].trains and labels is None and current.head_name != "causal_lm":
            raise ValueError(
                f"calibration: step {i}, {step['method']}, trains {type(current).__name__} with head "
                f"{current.head_name}; give its inputs by name with 'labels', or a classifier of sequences a .jsonl, "
                ".csv or .tsv file with columns text and label"
            )
    if evaluation is not None:
        evaluation, metric, metric_name = evaluation_of(current, evaluation, length, batch_size)
    # the inputs of a classifier of images or sounds are known from its data alone
    alone = calibration is None and isinstance(evaluation, Mapping)
    example = example_of(current, evaluation if alone else calibration)

    out.mkdir(parents=True, exist_ok=True)
    key = fingerprint(str(seed), [functional(current)[1], calibration, labels])
    known = _known_rows(out / "report.json")
    rows: list[Row] = []

    def measured(name: str, key: str, m: nnx.Module, directory: str | None) -> None:
        told = fingerprint(f"{key}{metric_name}", [evaluation])
        if told not in known:
            known[told] = dataclasses.asdict(_measure(name, m, example, metric, directory))
        rows.append(Row(**known[told]))
        write_json_atomic(out / "report.json", {"metric": metric_name, "rows": known})

    measured("source", key, current, None)
    for i, step in enumerate(steps):
        key = fingerprint(key + json.dumps(step, sort_keys=True), [])
        directory = out / f"{i}-{step['method']}-{key[-8:]}"
        if not directory.is_dir():
            began, work = time.perf_counter(), out / f".{directory.name}.work"
            data = Data(calibration, labels, jax.random.fold_in(jax.random.key(seed), i), work)
            try:
                small = METHODS[step["method"]].apply(current, dict(step["options"]), data)
            except ValueError as error:
                raise ValueError(f"recipe: step {i}, {step['method']}: {error}") from error
            hub.save(small, directory)
            shutil.rmtree(work, ignore_errors=True)
            log.info("step %d, %s: %.1f s", i, step["method"], time.perf_counter() - began)
        current = hub.load(directory)  # what a resumed run would go on with
        measured(f"{i} {_told(step)}", key, current, directory.name)
    report = Report(current, tuple(rows), metric_name)
    _draw(out / "figure.png", report)
    return report


def _measure(name: str, model: nnx.Module, example: Any, metric: Callable | None, directory: str | None) -> Row:
    apply, params = functional(model)
    run = lambda params, batch: jax.tree.leaves(apply(params, batch))  # noqa: E731
    costs, timed = cost(run, params, example), latency(run, params, example, batch=1)
    quality = None if metric is None else float(metric(model))
    return Row(name, costs.parameters, costs.parameter_bytes, costs.macs, 1e3 * timed.seconds, quality, directory)


def _known_rows(file: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run has measured, by checksum; nothing where the file cannot be read."""
    try:
        rows = json.loads(file.read_text())["rows"]
        return {
            told: row for told, row in rows.items() if set(row) == {field.name for field in dataclasses.fields(Row)}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _told(step: Mapping[str, Any]) -> str:
    options = " ".join(f"{name}={value}" for name, value in step["options"].items())
    return f"{step['method']} {options}".rstrip()


def _draw(path: Path, report: Report) -> None:
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    sizes = [r.bytes / 1e6 for r in report.rows]
    quality = [np.nan if r.quality is None else r.quality for r in report.rows]
    axis.plot(sizes, quality, "o-")
    for r, x, y in zip(report.rows, sizes, quality, strict=True):
        axis.annotate(" ".join(r.step.split()[:2]), (x, y), textcoords="offset points", xytext=(4, 4))
    axis.set(xlabel="weights as stored (MB)", ylabel=report.metric)
    figure.savefig(path, dpi=120)
