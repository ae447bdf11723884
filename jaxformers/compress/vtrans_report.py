"""What pruning by VTrans has made of a model, in numbers."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxformers.compress.vtrans import Costs
from jaxformers.cost import cost, latencies
from jaxformers.functional import functional

ROWS = 8  # of a timed call


def report(
    model: nnx.Module, small: nnx.Module, masks: Mapping[str, Any], counted: Costs, rows: Mapping[str, Any], timed: bool
) -> dict[str, Any]:
    """``actual_sparsity`` by ``counted``; ``kept``: units of each kind, before and after; ``parameters`` (all of
    them), ``flops`` and, where ``timed``, ``latency_seconds`` (median) of a call with up to 8 of ``rows``, before and
    after."""
    batch = {name: x[:ROWS] for name, x in rows.items() if name != "labels"}
    called = {"before": (*functional(model), batch), "after": (*functional(small), batch)}
    costs = [cost(*call) for call in called.values()]
    seconds = latencies(called, batch=len(batch["input_ids"])) if timed else {}
    hard = jax.tree.map(lambda mask: (np.asarray(mask) != 0).astype(np.float32), masks)
    count = lambda mine, get: int(sum(get(mask) for mask in jax.tree.leaves(mine)))
    return {
        "actual_sparsity": float(counted.sparsity(hard)),
        "kept": {kind: [count(m, lambda x: x.size), count(m, lambda x: x.sum())] for kind, m in hard.items()},
        "kept_by_layer": {
            kind: {path: int(x.sum()) for path, x in mine.items()} for kind, mine in hard.items() if kind != "hidden"
        },
        "parameters": [c.parameters for c in costs],
        "flops": [c.flops for c in costs],
        "latency_seconds": [taken.seconds for taken in seconds.values()] or None,
    }


def mean(evaluate: Callable, params: Any, rows: Mapping[str, np.ndarray], batch: int) -> float:
    """The mean of ``evaluate(params, batch)`` over whole batches of ``rows``."""
    n = len(rows["input_ids"])
    size = min(batch, n)
    parts = [{name: x[i : i + size] for name, x in rows.items()} for i in range(0, n - size + 1, size)]
    return float(np.mean([float(evaluate(params, part)) for part in parts]))
