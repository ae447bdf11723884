"""Teacher Intervention's recipe: a fine-tuned encoder and its training set in, ternary weights out.

The method and its loss are in `jaxformers.compress.teacher_intervention`. Step 1 trains under the intervention, with a
warm-up and a decay of its own; step 2 begins from its last weights with a new optimiser and schedule, without
intervention, for the rest of the steps (arXiv 2302.11812, section 4). TinyBERT's data augmentation, which the authors'
scripts may put before it, is not here: it only makes `data` longer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxformers import hub, weights
from jaxformers.compress.teacher_intervention import (
    MARK,
    TIConfig,
    check_models,
    forward_pass,
    mode_schedule,
    ternary_kernels,
    ti_objective,
)
from jaxformers.data.batches import array_batches
from jaxformers.functional import with_params
from jaxformers.train.loop import TrainConfig, fit
from jaxformers.train.optim import OptimConfig
from jaxformers.train.stream import Stream
from jaxformers.weights import fake_quantise, full_precision, pack_ternary

# The paper's step count is ceil(examples / batch) · 3 epochs; give it as `steps`.
PAPER = OptimConfig(name="bert_adam", learning_rate=2e-5, warmup=0.1, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """`student`: the fake-quantised model. `packed`: the same in 2-bit codes, None where no weight is ternary.
    `history`: the records of training of "step1" and "step2". `modes`: the intervention of each step of step 1."""

    student: nnx.Module
    packed: nnx.Module | None
    history: dict[str, list[dict[str, Any]]]
    modes: tuple[str, ...]


def qat(
    teacher: str | Path | nnx.Module,
    data: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    out: str | Path | None = None,
    *,
    key: jax.Array,
    train: TrainConfig,
    config: TIConfig = TIConfig(),
    batch_size: int = 32,
    student: str | Path | nnx.Module | None = None,
    heldout: Mapping[str, Any] | None = None,
    metric: Callable[[np.ndarray, np.ndarray], Mapping[str, float]] | None = None,
    directory: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    step1_eval_every: int | None = None,
) -> Quantised:
    """Quantise `teacher`, a fine-tuned classifier or regressor, to ternary weights by training.

    Args:
        teacher: a checkpoint directory, a hub id, or a model with a head that gives logits; left untouched.
        data: the training rows {"input_ids" (n, L), "attention_mask", ..., "labels" (n,)}, of which batches of
            `batch_size` are drawn (another order in each step), or batches as `fit` takes them. Labels are used only
            by the loss's `truth`.
        out: receives `shadow/` (the full-precision weights, an ordinary checkpoint) and `packed/` (2-bit codes,
            scales, and what is not quantised; `jaxformers.load` gives the same logits).
        train: `steps` counts both steps together. PAPER is the paper's optimiser, whose schedule begins anew in step 2.
        student: where training begins, in full precision; the teacher by default.
        heldout: rows with labels, for `eval_loss` and `metric(logits, labels)` (default: accuracy; for one output the
            Pearson correlation), without intervention; in step 1 also with it, as `eval_<name>_with`.
        directory: keeps metrics and checkpoints of both steps; the same call goes on where it stopped.
        step1_eval_every: steps between evaluations in step 1; None: `train.eval_every`, as in step 2.

    Raises ValueError, before any compute, when the models differ in shape, `step1` leaves no step for step 2, or a
    pattern matches no weight.
    """
    teacher, start = (m if isinstance(m, nnx.Module) or m is None else hub.load(m) for m in (teacher, student))
    start = teacher if start is None else start
    check_models(teacher, start)
    if config.intervention != "none" and config.step1 >= train.steps:
        raise ValueError(f"step1: {config.step1} of {train.steps} steps leave none for step 2")
    options = {"scan_layers": train.scan_layers, "remat": train.remat}
    train = dataclasses.replace(train, scan_layers=False, remat=None)  # `fit` is given parameters, not a model
    kernels = ternary_kernels(start) if config.kernels is None else dict(config.kernels)
    model = fake_quantise(start, kernels, inputs=config.inputs, attention=config.attention)
    objective, params, freeze = ti_objective(teacher, model, config, **options)

    first, second, draw = jax.random.split(key, 3)
    modes = mode_schedule(config.intervention, config.step1, draw)
    stages = {"step1": (modes, first), "step2": (("none",) * (train.steps - len(modes)), second)}
    measures = None
    if heldout is not None:
        measures = _evaluation(forward_pass(teacher, model, config, options), heldout, batch_size, metric)
    history: dict[str, list[dict[str, Any]]] = {}
    for i, (name, (marks, own)) in enumerate(stages.items()):
        history[name] = []
        if not marks:
            continue
        # step 2 must find what step 1 left, when it is to be taken up again
        saves = train.checkpoint_every or (0 if directory is None else len(marks))
        often = step1_eval_every if name == "step1" and step1_eval_every is not None else train.eval_every
        run = dataclasses.replace(
            train, steps=len(marks), freeze=(*train.freeze, *freeze), checkpoint_every=saves, eval_every=often
        )
        batches = array_batches(data, batch_size, seed=i) if isinstance(data, Mapping) else data
        measure = measures and functools.partial(measures, marks)
        place = None if directory is None else Path(directory) / name
        result = fit(
            objective, params, _Marked(batches, marks), run, key=own, evaluate=measure, directory=place, mesh=mesh
        )
        params, history[name] = {**params, "student": result.params["student"]}, result.history
    model = with_params(model, params["student"])
    ternary = any(rule is not None and rule.kind == "twn" for rule in kernels.values())
    packed = pack_ternary(model) if ternary else None
    if out is not None:
        hub.save(full_precision(model), Path(out) / "shadow")
        if packed is not None:
            hub.save(packed, Path(out) / "packed")
    return Quantised(model, packed, history, modes)


class _Marked:
    """Endless batches of `data`, each marked with the mode of its step; its position is kept in checkpoints."""

    def __init__(self, data: Iterable, modes: tuple[str, ...]):
        self.stream, self.modes, self.step = Stream(data), modes, 0

    def __iter__(self) -> _Marked:
        return self

    def __next__(self) -> dict[str, Any]:
        batch, mode = dict(self.stream.next()), self.modes[min(self.step, len(self.modes) - 1)]
        self.step += 1
        if mode != "none":
            batch[MARK + mode] = np.zeros(len(next(iter(batch.values()))), bool)
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"step": self.step, "stream": self.stream.state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.stream.restore(state["stream"])


def _evaluation(forward: Callable, rows: Mapping[str, Any], size: int, metric: Callable | None) -> Callable:
    """What `fit` calls, given each step's mode: the student without intervention, and with that of the present step."""
    run, zeros = jax.jit(lambda params, batch: forward(params, batch, None)), jax.jit(weights.zero_fraction)
    n = len(next(iter(rows.values())))
    if "labels" not in rows or n == 0:
        raise ValueError("heldout: rows with labels are needed to measure anything")

    def measured(params: Any, mode: str, suffix: str) -> dict[str, float]:
        logits, losses = [], []
        for start in range(0, n, size):
            batch = {name: x[start : start + size] for name, x in rows.items()}
            count = len(batch["labels"])
            batch = batch if mode == "none" else {**batch, MARK + mode: np.zeros(count, bool)}
            loss, _, z = run(params, batch)
            logits.append(np.asarray(z))
            losses.append(float(loss) * count)
        found = (metric or _quality)(np.concatenate(logits), np.asarray(rows["labels"]))
        return {f"eval_{k}{suffix}": v for k, v in {"loss": sum(losses) / n, **found}.items()}

    def evaluate(marks: tuple[str, ...], params: Any, step: int) -> dict[str, float]:
        mode = marks[step - 1]
        with_it = {} if mode == "none" else measured(params, mode, "_with")
        return {**measured(params, "none", ""), **with_it, "eval_zeros": float(zeros(params["student"]))}

    return evaluate


def _quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    if logits.shape[-1] == 1:
        return {"pearson": float(np.corrcoef(logits[:, 0], labels)[0, 1])}
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}
