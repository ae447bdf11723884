"""The sparsity–quality curve, the point where it begins to fall, lottery tickets, and how alike two masks are.

Source: arXiv 2306.03805. The paper shows curves; the operational definitions are this library's. With a metric that
is better when higher (an accuracy; for a perplexity, minus its logarithm), on a grid of sparsities from 0 on:

    ES_τ = the largest s of the grid with metric(s') >= metric(0) - τ for every s' <= s          (τ: 0.01 of the scale)
    knee = the s with the largest metric(s) - chord(s), the chord joining the first and the last point
    similarity of two masks = |A ∩ B| / sqrt(|A| |B|) of the kept sets (cosine), or |A ∩ B| / |A ∪ B| (Jaccard)
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import atomic, paths, weights
from jaxformers.compress import threshold
from jaxformers.compress.essential_sparsity import BLOCKS, Masks, Pruned, apply_masks, prunable, prune

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Quality over sparsity by one ``method``; ``tau`` is the drop that still counts as none."""

    method: str
    sparsity: tuple[float, ...]
    metric: tuple[float, ...]
    tau: float = 0.01
    finetuned: bool = False

    @property
    def essential_sparsity(self) -> float:
        return essential_sparsity(self.sparsity, self.metric, self.tau)

    @property
    def knee(self) -> float:
        return knee(self.sparsity, self.metric)


def sparsity_sweep(
    model: nnx.Module,
    metric: Callable[[nnx.Module], float],
    *,
    methods: Sequence[str] = ("magnitude", "random"),
    grid: Sequence[float] = GRID,
    finetune: Callable[[nnx.Module], nnx.Module] | None = None,
    tau: float = 0.01,
    calibration: Any = None,
    key: jax.Array | None = None,
    directory: str | Path | None = None,
    **options: Any,
) -> list[Curve]:
    """One curve per method: prune ``model`` at each sparsity of ``grid``, and measure.

    ``metric(model)``: better when higher. ``finetune(model)``, if given, gets the pruned model with its masks fixed
    (:func:`jaxformers.weights.add_masks`) and returns it trained; at sparsity 0 too, so that what a curve falls from
    has trained as long. ``calibration``: for wanda and sparsegpt; ``key``: for random and erk. ``options``: further
    ones of :func:`prune`. ``directory`` receives ``sparsity.json`` (every curve with its essential sparsity and knee,
    and their definitions), ``sparsity.csv`` and, where matplotlib is installed, ``sparsity.png``.

    Raises ValueError for a grid that does not rise from 0, and as :func:`prune` does.
    """
    _check_curve(grid, grid)
    curves = []
    for method in methods:
        given = dict(options)
        if method in ("wanda", "sparsegpt"):
            given["calibration"] = calibration
        if method in ("random", "erk"):
            given["key"] = key
        values = []
        for s in grid:
            pruned = prune(model, method, sparsity=s, **given)
            ready = pruned.model
            if finetune is not None:
                ready = finetune(weights.add_masks(ready, pruned.masks))
            values.append(float(metric(ready)))
        curves.append(Curve(method, tuple(map(float, grid)), tuple(values), tau, finetune is not None))
    if directory is not None:
        write_curves(curves, directory)
    return curves


def essential_sparsity(sparsity: Sequence[float], metric: Sequence[float], tau: float = 0.01) -> float:
    """ES_τ, see the module. ``sparsity`` rises from 0; ``metric`` is better when higher, ``tau`` in its units.

    Raises ValueError for grids that do not, values that are not finite at sparsity 0, and a negative ``tau``.
    """
    _check_curve(sparsity, metric)
    if not tau >= 0:
        raise ValueError(f"tau={tau}: must be 0 or more")
    last = 0
    while last + 1 < len(metric) and metric[last + 1] >= metric[0] - tau:
        last += 1
    return float(sparsity[last])


def knee(sparsity: Sequence[float], metric: Sequence[float]) -> float:
    """The s with the largest distance of the metric above the chord from the first point to the last; of equal ones the
    first. Raises ValueError as :func:`essential_sparsity` does."""
    _check_curve(sparsity, metric)
    s, y = np.asarray(sparsity, np.float64), np.asarray(metric, np.float64)
    if len(s) == 1:
        return float(s[0])
    chord = y[0] + (y[-1] - y[0]) * (s - s[0]) / (s[-1] - s[0])
    return float(s[np.argmax(y - chord)])


def _check_curve(sparsity: Sequence[float], metric: Sequence[float]) -> None:
    if len(sparsity) != len(metric) or not len(sparsity) or sparsity[0] != 0 or np.any(np.diff(sparsity) <= 0):
        raise ValueError(f"sparsity: expected a grid that rises from 0, one metric each, got {tuple(sparsity)}")
    if not math.isfinite(metric[0]):
        raise ValueError(f"metric: {metric[0]} at sparsity 0 is nothing to fall from")


def write_curves(curves: Sequence[Curve], directory: str | Path) -> None:
    """``sparsity.json``, ``sparsity.csv`` and, where matplotlib is installed, ``sparsity.png`` in ``directory``."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = {
        "definitions": {
            "essential_sparsity": "largest s of the grid with metric(s') >= metric(0) - tau for every s' <= s",
            "knee": "s with the largest metric(s) - chord(s), the chord joining the first and the last point",
            "sparsity": "share of the prunable weights, the matrices of the blocks' linear layers",
        },
        "curves": [
            {**dataclasses.asdict(c), "essential_sparsity": c.essential_sparsity, "knee": c.knee} for c in curves
        ],
    }
    text = json.dumps(found, indent=2, allow_nan=True)
    atomic.write_text_atomic(directory / "sparsity.json", text + "\n")
    rows = [
        f"{c.method},{c.finetuned},{s},{value!r}" for c in curves for s, value in zip(c.sparsity, c.metric, strict=True)
    ]
    atomic.write_text_atomic(directory / "sparsity.csv", "\n".join(["method,finetuned,sparsity,metric", *rows]) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(figure.subplots(), curves)
    figure.savefig(directory / "sparsity.png", dpi=100)


def draw(axis: Any, curves: Sequence[Curve]) -> None:
    """Draw ``curves`` into a matplotlib axis; a ring marks each one's essential sparsity."""
    for c in curves:
        label = f"{c.method}{', fine-tuned' if c.finetuned else ''} (ES {c.essential_sparsity:g})"
        (line,) = axis.plot(c.sparsity, c.metric, marker=".", label=label)
        at = c.sparsity.index(c.essential_sparsity)
        axis.plot(c.sparsity[at], c.metric[at], marker="o", markersize=10, fillstyle="none", color=line.get_color())
    axis.set(xlabel="share of the prunable weights removed", ylabel="metric, better when higher")
    axis.legend()


# ---- lottery tickets -----------------------------------------------------------------------------------------------


def lottery_ticket(
    model: nnx.Module,
    train: Callable[[nnx.Module, int], nnx.Module],
    *,
    rounds: int,
    share: float = 0.2,
    include: paths.Patterns = BLOCKS,
    exclude: paths.Patterns = (),
) -> Pruned:
    """Iterative magnitude pruning (the lottery ticket, arXiv 1803.03635, 2007.12223): the masks to compare with.

    ``rounds`` times: ``train(model with its masks, round)`` from the pretrained weights, remove round(``share`` · what
    is left) of the smallest trained weights of all matrices together, and rewind. The sparsity is about
    1 - (1 - share)^rounds. Returns the pretrained weights under the final masks.

    Raises ValueError for less than one round, a share outside (0, 1), and as :func:`prune` does.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: must be 1 or more")
    if not 0 < share < 1:
        raise ValueError(f"share={share}: must lie between 0 and 1")
    start = prunable(model, include, exclude)
    masks: Masks = {p: jnp.ones(k.shape, bool) if own is None else jnp.asarray(own) for p, (k, own) in start.items()}
    for i in range(rounds):
        trained = prunable(train(weights.add_masks(model, masks), i), include, exclude)
        if trained.keys() != masks.keys():
            raise ValueError(f"train: it returned another model, with {[*trained][:4]} to prune and not {[*masks][:4]}")
        keys = [threshold.keys(kernel, masks[path]) for path, (kernel, _) in trained.items()]
        left = sum(int(jnp.sum(mask)) for mask in masks.values())
        gone = threshold.smallest_of_all(keys, sum(k.size for k in keys) - left + round(share * left))
        masks = {path: ~g for path, g in zip(masks, gone, strict=True)}
    return apply_masks(model, masks)


# ---- comparing masks -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How alike the kept sets of two masks are, over all matrices and in each of them (by path)."""

    overall: float
    matrices: dict[str, float]


def mask_similarity(a: Mapping[str, Any], b: Mapping[str, Any], *, kind: str = "cosine") -> Similarity:
    """``kind`` "cosine": |A ∩ B| / sqrt(|A| |B|), or "jaccard": |A ∩ B| / |A ∪ B|, of what is kept. 1 when nothing is.

    Two masks at random with density d have a cosine of about d: compare with that. Raises ValueError when the masks
    are not of the same matrices, naming those that differ.
    """
    if kind not in ("cosine", "jaccard"):
        raise ValueError(f"kind={kind!r}: must be 'cosine' or 'jaccard'")
    shape = lambda masks, path: tuple(masks[path].shape) if path in masks else None  # noqa: E731
    differ = [path for path in sorted({*a, *b}) if shape(a, path) != shape(b, path)]
    if differ or not a:
        said = ", ".join(f"{path} ({shape(a, path)} and {shape(b, path)})" for path in differ[:5])
        raise ValueError(f"a, b: masks of different models: {said or 'there are none'}")
    counts = {}
    for path in a:
        x, y = np.asarray(a[path], bool), np.asarray(b[path], bool)
        counts[path] = np.asarray([np.sum(x & y), np.sum(x), np.sum(y)], np.int64)
    return Similarity(_alike(sum(counts.values()), kind), {path: _alike(c, kind) for path, c in counts.items()})


def _alike(counts: np.ndarray, kind: str) -> float:
    both, x, y = (int(n) for n in counts)
    if x == y == 0:
        return 1.0
    if kind == "jaccard":
        return both / (x + y - both)
    return both / math.sqrt(x * y) if x and y else 0.0
