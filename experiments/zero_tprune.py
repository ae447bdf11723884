"""Zero-TPrune: which tokens of a trained ViT can go, without training it again, at a third and half of its cost less?

A small ViT is trained once a seed, then pruned to 65 and 50 % of its multiply-adds by Zero-TPrune, by parts of it, by
the class token's attention and at random, all by the same schedule; and by the best schedule of a random search on
held-in images. A second table has the seconds that a ViT of 197 tokens takes, as it is and pruned.

    python -m experiments.zero_tprune              # small: minutes on two CPU cores, three seeds
    python -m experiments.zero_tprune paper --model facebook/deit-small-patch16-224 --data imagenet/val

Data: `--data` an .npz with images (N, H, W, C) uint8, labels and split ("train", "test"), or a directory of one folder
of image files a class (default: sign_digits beside the repository, else scikit-learn's digits, 8 × 8 pixels).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common
from jaxformers import losses
from jaxformers.compress import zero_tprune as zt
from jaxformers.compress import zero_tprune_search as zs
from jaxformers.compress.zero_tprune import Options
from jaxformers.data.batches import array_batches
from jaxformers.extras import require
from jaxformers.models import vit
from jaxformers.train import OptimConfig, TrainConfig, fit

WAYS = {
    "Zero-TPrune": Options(),
    "uniform first votes": Options(cls_weighting="uniform"),
    "mean over all heads": Options(eir=False, vhf=False),
    "importance alone": Options(method="i_stage"),
    "similarity alone": Options(method="s_stage"),
    "class token's attention": Options(method="cls_attention"),
    "random": Options(method="random"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """`model`: a checkpoint to prune; None trains a ViT of the sizes below on `grid` × `grid` patches. `held_in`:
    training images that only the search sees. `random_draws`: how often random pruning is repeated for its mean.
    `ways`: of choosing tokens, some of WAYS. `timed`: layers and width of the ViT that is timed at 224² pixels;
    0 layers: none."""

    data: Path | None = None
    model: str | None = None
    grid: int = 8
    width: int = 48
    layers: int = 4
    heads: int = 4
    std: float = 0.1
    steps: int = 1500
    batch: int = 32
    rate: float = 3e-3
    shift: int = 3
    budgets: tuple[float, ...] = (0.65, 0.5)
    held_in: int = 256
    trials: int = 12
    test_images: int | None = None
    random_draws: int = 3
    ways: tuple[str, ...] = tuple(WAYS)
    timed: tuple[int, int] = (12, 192)
    timed_batch: int = 16
    seeds: int = 3


PRESETS = {
    "smoke": Config(width=16, layers=3, heads=2, steps=4, batch=16, budgets=(0.65,), held_in=16, trials=2,
                    test_images=24, random_draws=1, ways=("Zero-TPrune", "random"), timed=(0, 0), seeds=1),
    "small": Config(),
    "paper": Config(model="facebook/deit-small-patch16-224", batch=256, held_in=2000, trials=300, timed_batch=256,
                    seeds=1),
}  # fmt: skip


class Images(NamedTuple):
    """``read(indices)`` gives pixel_values (n, C, H, W) of the images that ``labels`` belong to."""

    read: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray

    def some(self, index: np.ndarray) -> "Images":
        return Images(lambda i: self.read(index[i]), self.labels[index])


def run(config: Config, out: Path) -> dict[str, Any]:
    """One row for each seed, budget and way; written to `metrics.jsonl` as they come."""
    train, test = images(config)
    runs: dict[str, Callable] = {}  # one program for all models and schedules of a way
    rows: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        order = np.random.default_rng(seed).permutation(len(train.labels))
        held_in, rest = train.some(order[: config.held_in]), train.some(order[config.held_in :])
        model = jf.load(config.model) if config.model is not None else trained(config, rest, seed)
        dense = accuracy(config, runs, "Zero-TPrune", model, (), test, seed)
        common.record(out, rows, {"seed": seed, "budget": 1.0, "way": "dense", "accuracy": dense})
        seen, labels = held_in.read(np.arange(len(held_in.labels))), held_in.labels
        for budget in config.budgets:
            schedule = zs.uniform_schedule(model, budget)
            for way in config.ways:
                draws = range(config.random_draws if way == "random" else 1)
                found = [accuracy(config, runs, way, model, schedule, test, 100 * seed + i) for i in draws]
                own = {"seed": seed, "budget": budget, "way": way, "accuracy": float(np.mean(found))}
                common.record(out, rows, own)
            best = zs.search(
                model, seen, labels, budget=budget, trials=config.trials, batch_size=config.batch,
                key=jax.random.key(seed), slack=min(0.1, budget),
            )[-1]  # fmt: skip
            found = accuracy(config, runs, "Zero-TPrune", model, best.schedule, test, seed)
            common.record(out, rows, {"seed": seed, "budget": budget, "way": "searched schedule", "accuracy": found,
                               "schedule": [dataclasses.astuple(stage) for stage in best.schedule]})  # fmt: skip
    report(config, rows, out)
    return {"rows": rows, "seconds at 224²": timed(config, None if config.model is None else model)}


def images(config: Config) -> tuple[Images, Images]:
    """(training, test)."""
    path = common.shared_data("sign_digits", config.data)
    if path is not None and path.is_dir() and config.data is not None:
        return folder(config, path)
    if path is not None:
        file = path / "sign_digits_32.npz" if path.is_dir() else path
        with np.load(file) as z:
            pixels, labels, split = z["images"], z["labels"], z["split"]
    else:
        digits = require("sklearn.datasets", "link").load_digits()
        pixels, labels = (digits.images[..., None] * (255 / 16)).astype(np.uint8), digits.target
        split = np.where(np.random.default_rng(0).permutation(len(labels)) < 400, "test", "train")
    pixels = np.moveaxis(pixels.astype(np.float32) / 127.5 - 1, -1, 1)
    split = split.astype(str)
    parts = [(pixels[split == name], labels[split == name].astype(np.int32)) for name in ("train", "test")]
    train, test = (Images(lambda i, x=x: x[i], y) for x, y in parts)
    return train, test.some(np.arange(len(test.labels))[: config.test_images])


def folder(config: Config, path: Path) -> tuple[Images, Images]:
    """A directory with one folder a class, in the order of their names: `held_in` random images to search on, and the
    others to report on, as the checkpoint's own processor reads them."""
    if config.model is None:
        raise ValueError(
            "model: a directory of classes is for a checkpoint; name one, such as facebook/deit-small-patch16-224"
        )
    classes = sorted(d for d in path.iterdir() if d.is_dir())
    files = [(file, label) for label, d in enumerate(classes) for file in sorted(d.iterdir())]
    if len(files) <= config.held_in:
        raise ValueError(
            f"data: {path} has {len(files)} images in {len(classes)} folders; expected more than {config.held_in}"
        )
    processor = jf.load_image_processor(config.model)
    names, labels = [str(file) for file, _ in files], np.asarray([label for _, label in files])
    every = Images(lambda i: processor([names[j] for j in i])["pixel_values"], labels)
    order = np.random.default_rng(0).permutation(len(files))
    return every.some(order[: config.held_in]), every.some(order[config.held_in :][: config.test_images])


def trained(config: Config, data: Images, seed: int) -> nnx.Module:
    """A ViT trained from nothing on images that are shifted at random."""
    pixels = data.read(np.arange(len(data.labels)))
    shape = vit.Config(
        hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        intermediate_size=2 * config.width, initializer_range=config.std,
        image_size=pixels.shape[2:], num_channels=pixels.shape[1],
        patch_size=(pixels.shape[2] // config.grid, pixels.shape[3] // config.grid),
        num_labels=int(data.labels.max()) + 1,
    )  # fmt: skip
    model = jf.init(shape, head="image_classification", key=jax.random.key(seed))
    margin = min(config.shift, pixels.shape[2] // 8)

    def objective(apply: Any, params: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, Any]]:
        moved = shifted(batch["pixel_values"], margin, key)
        return losses.cross_entropy(apply(params, {"pixel_values": moved}).logits, batch["labels"]), {}

    batches = array_batches({"pixel_values": pixels, "labels": data.labels}, config.batch, seed=seed)
    optim = OptimConfig(learning_rate=config.rate, schedule="cosine", warmup=0.1, weight_decay=0.05)
    settings = TrainConfig(steps=config.steps, optim=optim, log_every=max(1, config.steps // 10))
    return fit(objective, model, batches, settings, key=jax.random.key(seed)).model


def shifted(pixels: jax.Array, margin: int, key: jax.Array) -> jax.Array:
    """Each image moved by up to ``margin`` pixels; what comes in from outside repeats the edge."""
    padded = jnp.pad(pixels, ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="edge")
    offsets = jax.random.randint(key, (len(pixels), 2), 0, 2 * margin + 1)
    return jax.vmap(lambda x, o: jax.lax.dynamic_slice(x, (0, o[0], o[1]), pixels.shape[1:]))(padded, offsets)


def accuracy(
    config: Config, runs: dict[str, Callable], way: str, model: nnx.Module, schedule: Any, data: Images, draw: int
) -> float:
    """Of ``model`` pruned by ``schedule``. One program serves all schedules: pruned tokens are masked."""
    blocks = tuple(range(1, len(model.layers)))
    apply, params = zs.simulator(model, blocks)
    run = runs.setdefault(way, jax.jit(lambda p, b, n, key: apply(p, b, n, options=WAYS[way], key=key).argmax(-1)))
    numbers = zs.counts_of(schedule, blocks, zt.patch_count(model, data.read(np.arange(1)).shape))
    right = 0
    for start in range(0, len(data.labels), config.batch):
        index = np.arange(start, start + config.batch).clip(max=len(data.labels) - 1)
        key = jax.random.fold_in(jax.random.key(draw), start)
        hits = np.asarray(run(params, {"pixel_values": data.read(index)}, numbers, key)) == data.labels[index]
        right += int(hits[: len(data.labels) - start].sum())
    return right / len(data.labels)


def timed(config: Config, model: nnx.Module | None) -> list[dict[str, Any]]:
    """Multiply-adds and seconds of ``model``, or of a ViT of random weights at 224² pixels, as it is and pruned."""
    layers, width = config.timed
    if not layers:
        return []
    if model is None:
        shape = vit.Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
                           intermediate_size=4 * width, num_labels=1000)  # fmt: skip
        model = jf.init(shape, head="image_classification", key=jax.random.key(0))
    size = (config.timed_batch, model.config.num_channels, *model.config.image_size)
    pixels = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    rows = []
    for budget in config.budgets:
        found = zs.measure(model, pixels, zs.uniform_schedule(model, budget))
        rows.append({
            "MACs saved": found.macs_saved, "dense, images/s": found.dense_latency.throughput,
            "pruned, images/s": found.pruned_latency.throughput, "times as fast": found.speedup,
            "batch": config.timed_batch,
        })  # fmt: skip
    common.table(f"a ViT of {len(model.layers)} layers, 224² pixels, on {jax.devices()[0].device_kind}", rows)
    return rows


def report(config: Config, rows: list[dict[str, Any]], out: Path) -> None:
    """The table (mean and deviation over seeds) and the figure."""
    seen = lambda budget, way: [r["accuracy"] for r in rows if r["budget"] == budget and r["way"] == way]
    ways = (*config.ways, "searched schedule")
    name = lambda budget: f"{100 * (1 - budget):.0f} % fewer MACs"
    table = [{"way": "dense", **{name(budget): common.mean_std(seen(1.0, "dense")) for budget in config.budgets}}]
    table += [{"way": way, **{name(b): common.mean_std(seen(b, way)) for b in config.budgets}} for way in ways]
    common.table("accuracy on test images", table)

    def draw(fig: Any) -> None:
        for axis, budget in zip(fig.subplots(1, len(config.budgets), squeeze=False)[0], config.budgets, strict=True):
            axis.axvline(np.mean(seen(1.0, "dense")), color="grey", linewidth=1)
            for row, way in enumerate(ways):
                axis.errorbar(np.mean(seen(budget, way)), row, xerr=np.std(seen(budget, way)), fmt="o", capsize=3)
            axis.set_yticks(range(len(ways)), ways)
            axis.invert_yaxis()
            axis.set(xlabel="accuracy on test images (line: nothing pruned)", title=name(budget))

    common.figure(out / "figure.png", draw, size=(10, 3.2))


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: the pruned forward pass of `model`, a batch spread over the mesh."""
    from jaxformers.dryrun import Step
    from jaxformers.dryrun_steps import Array, config_dict, replicated, size, spread

    if config.model is None:
        raise ValueError("model: this preset trains its own; name one, such as facebook/deit-small-patch16-224")
    kept: list[Any] = []

    def build() -> Any:
        model = jf.init(config_dict(config.model), head="image_classification", key=jax.random.key(0))
        apply, params = zt.pruner(model)
        kept.extend((apply, (model.config.num_channels, *model.config.image_size)))
        return params

    params = replicated(jax.eval_shape(build), mesh)
    batch = spread({"pixel_values": Array((config.timed_batch, *kept[1]), jnp.float32)}, mesh)
    forward = lambda params, batch: kept[0](params, batch, zt.DEIT_S, Options(graph="matrix")).output.logits
    name = f"zero_tprune, {config.model} by the paper's schedule, {config.timed_batch} images"
    return Step(name, forward, (params, batch), parameters=size(params))


if __name__ == "__main__":
    common.main("zero_tprune", PRESETS, run, step=step)
