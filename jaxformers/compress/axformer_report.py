"""What a specialised model costs and how right it is, beside the model that it came from (AxFormer, `axformer.py`)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from jaxformers.compress import axformer
from jaxformers.cost import Cost, Latency, cost, latencies
from jaxformers.functional import functional

Metric = Callable[[np.ndarray, np.ndarray], float]  # (labels, predicted classes) -> a number


@dataclasses.dataclass(frozen=True)
class Row:
    """A model: mean ``loss`` and ``metric`` on validation and test data, and what a batch of the latter costs."""

    validation_loss: float
    test_loss: float
    validation_metric: float | None
    test_metric: float | None
    cost: Cost
    latency: Latency


@dataclasses.dataclass(frozen=True)
class Report:
    """The model as given and specialised. As text: two lines, and what was saved."""

    before: Row
    after: Row

    def __str__(self) -> str:
        shown = lambda value: "–" if value is None else f"{value:.4f}"
        row = lambda name, r: (
            f"{name}: validation loss {r.validation_loss:.4f}, metric {shown(r.validation_metric)}; test loss "
            f"{r.test_loss:.4f}, metric {shown(r.test_metric)}; {r.cost.parameters:,} parameters, "
            f"{r.cost.macs / r.latency.batch / 1e6:.4g} MMACs and {1e3 / r.latency.throughput:.3g} ms a row"
        )
        a, b = self.before, self.after
        saved = lambda x, y: f"{100 * (1 - y / x):.1f} %"
        return "\n".join([
            row("before", a), row("after ", b),
            f"saved: {saved(a.cost.parameters, b.cost.parameters)} of the parameters, "
            f"{saved(a.cost.macs, b.cost.macs)} of the multiply-adds, {saved(a.latency.seconds, b.latency.seconds)} of "
            "the time",
        ])  # fmt: skip


def report(
    before: nnx.Module,
    after: nnx.Module,
    validation: Mapping[str, Any],
    test: Mapping[str, Any],
    *,
    metric: Metric | None = None,
    losses: axformer.Losses | None = None,
    batch_size: int = 128,
    repeats: int = 10,
) -> Report:
    """Compare ``before`` with ``after``, which :func:`jaxformers.compress.axformer.specialise` has made of it.

    ``metric(labels, classes)``: by default accuracy, where samples have one class each. Parameters and multiply-adds
    are the models' own; times are medians of a batch of test rows, calls taking turns. Raises ValueError as
    :func:`jaxformers.compress.axformer.specialise` for data that do not fit, the test set as validation among them.
    """
    validation = axformer._checked_data(validation, test, losses)
    test = axformer._checked_data(test, None, losses)
    batch = {name: array[:batch_size] for name, array in test.items() if name not in axformer.TARGETS}
    models = {"before": before, "after": after}
    runs = {name: functional(model) for name, model in models.items()}
    logits = {name: lambda p, b, apply=apply: apply(p, b).logits for name, (apply, _) in runs.items()}
    times = latencies({name: (logits[name], runs[name][1], batch) for name in models}, repeats=repeats)
    rows = {}
    for name, model in models.items():
        seen = [_losses(model, data, metric, losses, batch_size) for data in (validation, test)]
        (a, m), (b, n) = seen
        rows[name] = Row(a, b, m, n, cost(logits[name], runs[name][1], batch), times[name])
    return Report(rows["before"], rows["after"])


def _losses(
    model: nnx.Module, data: Mapping[str, np.ndarray], metric: Metric | None, losses: Any, batch_size: int
) -> tuple[float, float | None]:
    _, each, classes = axformer.evaluator(model, data, k=None, batch_size=batch_size, losses=losses)(None)
    if classes is None or "labels" not in data or data["labels"].ndim != 1 or data["labels"].dtype.kind not in "iu":
        return float(each.mean(dtype=np.float64)), None
    metric = metric or (lambda labels, found: float((labels == found).mean()))
    return float(each.mean(dtype=np.float64)), metric(data["labels"], classes)
