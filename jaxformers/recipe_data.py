"""What a recipe measures on: calibration and evaluation data of a model, from files and arrays."""

import inspect
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxformers.compress.gptq import calibration_ids
from jaxformers.data.text import read_labelled
from jaxformers.data.tokenizers import load_tokenizer
from jaxformers.evaluation import accuracy, perplexity, windows_of_file
from jaxformers.models.config import positions_of


def calibration_of_file(model: nnx.Module, file: Path, *, samples: int, length: int, seed: int) -> Any:
    """Inputs by name (and "labels") or token ids, whichever a file holds."""
    if file.suffix == ".npz":
        return _arrays("calibration", file)
    read = labelled_rows if _holds_rows(model, file) else calibration_ids
    return read(model, file, samples=samples, length=length, seed=seed)


def evaluation_of(
    model: nnx.Module, evaluation: Any, length: int, batch_size: int
) -> tuple[Any, Callable[[nnx.Module], float], str]:
    """(data, metric, its name): accuracy where there are labels, else perplexity."""
    if isinstance(evaluation, str | Path) and Path(evaluation).suffix == ".npz":
        evaluation = _arrays("evaluation", Path(evaluation))
    elif isinstance(evaluation, str | Path) and _holds_rows(model, Path(evaluation)):
        evaluation = labelled_rows(model, Path(evaluation), length=length, seed=0, name="evaluation")
    if isinstance(evaluation, Mapping):
        if "labels" not in evaluation:
            raise ValueError(f"evaluation: accuracy needs 'labels' beside {', '.join(evaluation)}")
        return evaluation, lambda m: accuracy(m, evaluation, batch_size=batch_size), "accuracy"
    if model.head_name != "causal_lm":
        raise ValueError(
            f"evaluation: perplexity needs a causal language model, not {type(model).__name__} with head "
            f"{model.head_name}; give a classifier's inputs by name with 'labels' (arrays, .npz; of sequences also "
            "a .jsonl, .csv or .tsv file with columns text and label), or metric, a function of the model"
        )
    if isinstance(evaluation, str | Path):
        positions = positions_of(model.config) or length
        own = None if Path(evaluation).suffix == ".npy" else min(length, positions)
        evaluation = windows_of_file(model, evaluation, own)
    return evaluation, lambda m: perplexity(m, evaluation, evaluation.shape[1], batch_size=batch_size), "perplexity"


def _arrays(name: str, file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as found:
            return {key: found[key] for key in found.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: {file} cannot be read as arrays by name ({error})") from None


def _holds_rows(model: nnx.Module, file: Path) -> bool:
    table = [suffix for suffix in file.suffixes if suffix != ".gz"][-1:]
    return model.head_name == "sequence_classification" and bool({*table} & {".jsonl", ".ndjson", ".csv", ".tsv"})


def labelled_rows(
    model: nnx.Module, file: Path, *, samples: int | None = None, length: int, seed: int, name: str = "calibration"
) -> dict[str, np.ndarray]:
    """The inputs of a classifier of sequences and "labels", for ``samples`` rows of a table drawn without repetition
    (all, where there are fewer, or for None), by the tokenizer of the checkpoint that ``model`` came from.

    Raises ValueError for a file that is no such table, and a label that the model does not have.
    """
    if not file.is_file():
        raise ValueError(f"{name}: {file} does not exist")
    texts, labels = read_labelled(file)
    if not texts or labels.max() >= model.config.num_labels:
        found = "no rows" if not texts else f"the label {labels.max()}"
        raise ValueError(f"{name}: {file} has {found}; expected labels below {model.config.num_labels}")
    chosen = np.random.default_rng(seed).permutation(len(texts))[:samples]
    columns = zip(*(t if isinstance(t, tuple) else (t,) for t in (texts[i] for i in chosen)), strict=True)
    tokenizer = load_tokenizer(model.source)
    limits = (length, positions_of(model.config), tokenizer.max_length)
    rows = tokenizer(*map(list, columns), max_length=min(limit for limit in limits if limit is not None))
    inputs = inspect.signature(type(model).__call__).parameters
    return {name: array for name, array in rows.items() if name in inputs} | {"labels": labels[chosen]}


def example_of(model: nnx.Module, data: Any) -> dict[str, np.ndarray]:
    """One row of input, for the cost of a forward pass; None as ``data``: of as many tokens as 128 at most."""
    if isinstance(data, Mapping):
        return {name: np.asarray(array)[:1] for name, array in data.items() if name != "labels"}
    if data is not None:
        return {"input_ids": np.asarray(data)[:1].astype(np.int32)}
    if not hasattr(model.config, "vocab_size"):
        raise ValueError("calibration: give the model's inputs by name, so that its cost can be measured")
    length = min(128, positions_of(model.config) or 128)
    return {"input_ids": np.zeros((1, length), np.int32)}
