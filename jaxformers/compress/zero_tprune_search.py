"""What a schedule of Zero-TPrune costs, and a search for schedules under a budget; the method: `zero_tprune.py`.

The search draws schedules at random (the paper's Monte-Carlo simulation), keeps those whose multiply-adds fit the
budget, and measures each on held-in images. It only pretends to prune: removed tokens are masked and the numbers of a
schedule are traced, so that one program serves all schedules.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import nn, surgery
from jaxformers.compress import zero_tprune as zt
from jaxformers.compress.zero_tprune_graph import Counts, Options, Stage, choose, kept_patches, observed
from jaxformers.cost import Cost, Latency, cost, latencies


@dataclasses.dataclass(frozen=True)
class Trial:
    """A schedule, its multiply-adds an image (:func:`macs`), and the share of the images that it classified rightly."""

    schedule: tuple[Stage, ...]
    macs: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The model as it is and pruned, on a batch: what its traces cost, choosing tokens included, and seconds."""

    dense: Cost
    pruned: Cost
    dense_latency: Latency
    pruned_latency: Latency

    @property
    def macs_saved(self) -> float:
        """Share of the multiply-adds."""
        return 1 - self.pruned.macs / self.dense.macs

    @property
    def speedup(self) -> float:
        """Of the median call, as measured."""
        return self.dense_latency.seconds / self.pruned_latency.seconds

    def __str__(self) -> str:
        batch = self.dense_latency.batch
        row = lambda name, c, t: f"{name}: {c.macs / batch / 1e9:.4g} GMACs an image, {t.throughput:.4g} images/s"
        return "\n".join([
            row("dense", self.dense, self.dense_latency), row("pruned", self.pruned, self.pruned_latency),
            f"{100 * self.macs_saved:.1f} % fewer MACs, {self.speedup:.2f} times as fast in batches of {batch}",
        ])  # fmt: skip


def measure(
    model: nnx.Module, images: Any, schedule: Iterable[Stage], options: Options = Options(), *,
    key: jax.Array | None = None, repeats: int = 10, warmup: int = 2,
) -> Report:  # fmt: skip
    """Count and time ``model`` on ``images`` (B, C, H, W), as it is and pruned, calls taking turns.

    Raises ValueError as :func:`jaxformers.compress.zero_tprune.pruner` and :func:`jaxformers.cost.latency` do.
    """
    apply, params = zt.pruner(model)
    dense = lambda params, batch: apply(params, batch).output
    pruned = lambda params, batch: apply(params, batch, tuple(schedule), options, key).output
    batch = {"pixel_values": jnp.asarray(images)}
    programs = {"dense": (dense, params, batch), "pruned": (pruned, params, batch)}
    times = latencies(programs, repeats=repeats, warmup=warmup)
    return Report(cost(dense, params, batch), cost(pruned, params, batch), times["dense"], times["pruned"])


def macs(model: nnx.Module, schedule: Iterable[Stage] = (), shape: tuple[int, int, int] | None = None) -> float:
    """Multiply-adds of one image of ``shape`` (channels, height, width; default: the model's own), without those of
    choosing tokens, as the paper counts them: each block's at the number of tokens that enter it."""
    return _counter(model, shape)(tuple(schedule))


def votes_at(block: int, depth: int) -> int:
    """The paper's T for a layer behind ``block``: 30 in the first quarter of the blocks, 1 in the last, 5 between."""
    quarter = round(depth / 4)
    return 30 if block <= quarter else 1 if block > depth - quarter else 5


def uniform_schedule(
    model: nnx.Module,
    budget: float,
    *,
    blocks: Sequence[int] | None = None,
    remove: float = 0.05,
    shape: tuple[int, int, int] | None = None,
) -> tuple[Stage, ...]:
    """A schedule without a search: r = ⌊``remove`` n⌋ of the n image tokens that reach each layer, and the one keep
    rate, in steps of 0.01, that just fits ``budget`` times the dense multiply-adds.

    ``blocks``: the layers' places, by default five spread over all blocks but the last. Raises ValueError when no rate
    fits.
    """
    depth, counter = len(model.layers), _counter(model, shape)
    if blocks is None:
        blocks = sorted({round(float(b)) for b in np.linspace(1, max(depth - 1, 1), 5)})
    size = model.config.image_size if shape is None else shape[1:]
    patches, most = zt.patch_count(model, size), budget * counter(())

    def with_rate(percent: int) -> tuple[Stage, ...]:
        left, schedule = patches, []
        for block in blocks:
            schedule.append(Stage(int(block), int(remove * left), percent / 100, votes_at(block, depth)))
            left = kept_patches(schedule[-1], left)
        return tuple(schedule)

    if counter(with_rate(1)) > most:
        raise ValueError(
            f"budget: no keep rate behind blocks {tuple(blocks)} brings the multiply-adds down to {budget}"
        )
    fits, beyond = 1, 101  # the largest rate that fits is in [fits, beyond)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if counter(with_rate(middle)) <= most else (fits, middle)
    return with_rate(fits)


def search(
    model: nnx.Module,
    images: Any,
    labels: Any = None,
    *,
    budget: float,
    trials: int = 64,
    blocks: Sequence[int] | None = None,
    slack: float = 0.1,
    options: Options = Options(),
    key: jax.Array,
    batch_size: int = 64,
    report: list[Trial] | None = None,
) -> list[Trial]:
    """Schedules with at most ``budget`` of the dense model's multiply-adds (and at least ``budget − slack``): those of
    ``trials`` drawn at random that no other beats in both cost and accuracy, cheapest first.

    ``images`` (N, C, H, W) are held in: report on others. ``labels`` (N,); None: what the dense model says. ``blocks``:
    behind which tokens may go (counted from 1; default all but the last). A schedule has one to five layers, r up to an
    eighth of the tokens, keep rates of 0.5 to 1 and votes by :func:`votes_at`. ``report`` receives every trial.

    Raises ValueError for a model that cannot be pruned or has no classifier of the class token (pruned tokens are
    masked here, and a mean over patches would still count them), and when no schedule fits the budget.
    """
    zt.check_model(model)
    depth = len(model.layers)
    blocks = tuple(range(1, depth)) if blocks is None else tuple(sorted(set(blocks)))
    if not 0 < budget <= 1 or trials < 1 or not 0 < slack <= budget:
        raise ValueError(
            f"budget, slack, trials: expected 0 < slack ≤ budget ≤ 1 and a trial, got {budget}, {slack}, {trials}"
        )
    if not blocks or blocks[0] < 1 or blocks[-1] > depth:
        raise ValueError(f"blocks: expected some of 1 to {depth}, got {blocks}")
    images = np.asarray(images)
    counter, patches = _counter(model, images.shape[1:]), zt.patch_count(model, images.shape)
    dense = counter(())
    draw = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    apply, params = simulator(model, blocks)
    run = jax.jit(functools.partial(apply, options=options))

    def predictions(schedule: tuple[Stage, ...]) -> np.ndarray:
        numbers = counts_of(schedule, blocks, patches)
        found = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            padded = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)])
            own = jax.random.fold_in(key, start)
            found.append(np.asarray(run(params, {"pixel_values": padded}, numbers, key=own))[: len(part)].argmax(-1))
        return np.concatenate(found)

    labels = predictions(()) if labels is None else np.asarray(labels)
    if len(labels) != len(images) or not len(images):
        raise ValueError(f"labels: expected one for each image, got {len(labels)} for {len(images)}")
    found: dict[tuple[Stage, ...], Trial] = {}
    for _ in range(1000 * trials):
        schedule = _drawn(draw, blocks, depth, patches)
        if schedule in found or not budget - slack <= counter(schedule) / dense <= budget:
            continue
        if not _allowed(schedule, depth, patches, options, key):
            continue
        found[schedule] = Trial(schedule, counter(schedule), float((predictions(schedule) == labels).mean()))
        if len(found) == trials:
            break
    if not found:
        raise ValueError(f"budget: no schedule drawn has {budget - slack:.2f} to {budget:.2f} of the dense MACs")
    if report is not None:
        report.extend(found.values())
    return pareto(found.values())


def pareto(trials: Iterable[Trial]) -> list[Trial]:
    """Those that none beats, cheapest first: each costs more than the one before it, and is right more often."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.macs, -t.accuracy)):
        if not best or trial.accuracy > best[-1].accuracy:
            best.append(trial)
    return best


def simulator(model: nnx.Module, blocks: Sequence[int]) -> tuple[Callable[..., jax.Array], dict[str, Any]]:
    """``(apply, params)``; ``apply(params, batch, numbers, *, options, key) -> logits`` masks tokens instead of cutting
    them out. ``numbers``: an integer array (4, len(blocks)) of :class:`Counts`, behind each of ``blocks``.

    Raises ValueError for a head that looks at other tokens than the special ones.
    """
    width = model.config.hidden_size
    heads = [getattr(model.head, name, None) for name in ("classifier", "distillation_classifier")]
    if heads[0] is None or any(head is not None and head.kernel.get_value().shape[0] != width for head in heads):
        raise ValueError(f"model: {type(model).__name__} has no classifier of the class token alone")
    graph, state = nnx.split(surgery.copy(model))

    def apply(params: Any, batch: Any, numbers: jax.Array, *, options: Options, key: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        patches = zt.patch_count(model, batch["pixel_values"].shape)
        alive: list[jax.Array] = []

        def run(i: int, block: nnx.Module, x: jax.Array) -> jax.Array:
            if not alive:
                alive.append(jnp.ones(x.shape[:2], bool))
            if i + 1 not in blocks:
                return block(x, mask=nn.Mask(valid=alive[-1]))[0]
            x, seen = observed(block, x, options, alive[-1])
            counts = Counts(*numbers[:, blocks.index(i + 1)])
            keep, _ = choose(seen, x.shape[1] - patches, counts, options, jax.random.fold_in(key, i))
            alive.append(keep)
            return x

        model.layers = zt.Stack(model.layers, run)
        return model(pixel_values=batch["pixel_values"]).logits

    return apply, nnx.to_pure_dict(state)


def counts_of(schedule: tuple[Stage, ...], blocks: Sequence[int], patches: int) -> np.ndarray:
    plan, rows = {stage.block: stage for stage in schedule}, []
    for block in blocks:
        counts = Counts.of(plan.get(block, Stage(block)), patches)
        rows.append((counts.patches, counts.remove, counts.keep, counts.votes))
        patches = counts.keep
    return np.asarray(rows, np.int32).T


def _drawn(draw: np.random.Generator, blocks: Sequence[int], depth: int, patches: int) -> tuple[Stage, ...]:
    some = draw.choice(blocks, draw.integers(1, min(5, len(blocks)) + 1), replace=False)
    return tuple(
        Stage(int(b), int(draw.integers(patches // 8 + 1)), float(draw.integers(50, 101)) / 100, votes_at(b, depth))
        for b in sorted(some)
    )


def _allowed(schedule: tuple[Stage, ...], depth: int, patches: int, options: Options, key: Any) -> bool:
    try:
        zt.check_schedule(schedule, depth, patches, options, key)
    except ValueError:  # more tokens to remove than a stage has
        return False
    return True


def _counter(model: nnx.Module, shape: tuple[int, ...] | None) -> Callable[[tuple[Stage, ...]], float]:
    """``schedule -> multiply-adds of an image``, tracing a block once for each number of tokens."""
    config = model.config
    shape = (config.num_channels, *config.image_size) if shape is None else tuple(shape)
    apply, params = zt.pruner(model)
    images = {"pixel_values": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}
    patches = zt.patch_count(model, shape)
    specials = jax.eval_shape(apply, params, images).tokens.shape[1] - patches
    dense = cost(apply, params, images).macs

    blocks = [nnx.split(block) for block in model.layers]
    kinds = [
        (str(jax.tree.structure(state)), *((a.shape, a.dtype) for a in jax.tree.leaves(state))) for _, state in blocks
    ]

    @functools.cache
    def of_kind(kind: int, tokens: int) -> float:
        graph, state = blocks[kind]
        x = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.float32)
        return cost(lambda state, x: nnx.merge(graph, state)(x)[0], state, x).macs

    def block(i: int, tokens: int) -> float:
        return of_kind(kinds.index(kinds[i]), tokens)  # blocks of equal shapes cost the same

    def count(schedule: tuple[Stage, ...]) -> float:
        plan, left, total = {stage.block: stage for stage in schedule}, patches, dense
        for i in range(len(model.layers)):
            total += block(i, specials + left) - block(i, specials + patches)
            left = kept_patches(plan[i + 1], left) if i + 1 in plan else left
        return total

    return count
