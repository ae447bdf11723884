"""FuseGPT: what does grafting removed layers into their neighbours win back, and what would low-rank updates alone?

A small llama is trained; then a quarter of its layers is removed: at random, by block influence (ShortGPT), by macro
influence, by macro influence with low-rank updates trained round by round on the same data for as many steps, and by
FuseGPT, which trains the same and the grafts besides. The last two also run with all learning rates alike, since the
official one for low-rank updates is a hundredth of that for coefficients. Perplexity on held-out text says what each
costs.

    python -m experiments.fusegpt                  # small: minutes on two CPU cores, three seeds
    python -m experiments.fusegpt paper --model meta-llama/Llama-2-7b-hf --data c4.jsonl --test wiki.test.raw

Data: as in `experiments.gptq`. One dense model serves all seeds; a seed draws the calibration sequences, the first
values of the coefficients and the layers that are removed at random.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxformers as jf
from experiments import common, language
from jaxformers.compress.depth import block_influence, macro_influence, remove_layers
from jaxformers.compress.fusegpt import FuseConfig, fuse_layers
from jaxformers.data import text
from jaxformers.evaluation import perplexity


@dataclasses.dataclass(frozen=True)
class Config:
    """`model`: a checkpoint to shrink; None trains a llama of the sizes below. `share`: of layers that are removed."""

    data: Path | None = None
    test: Path | None = None
    model: str | None = None
    vocab: int = 1024
    width: int = 128
    layers: int = 8
    heads: int = 4
    mlp: int = 320
    length: int = 64
    steps: int = 600
    share: float = 0.25
    group: int = 4
    rank: int = 8
    epochs: int = 20
    samples: int = 32
    influence: int = 32
    batch: int = 8
    rate: float = 9.65e-6
    coefficient_rate: float = 1e-3
    windows: int | None = 200
    seeds: int = 3


PRESETS = {
    "smoke": Config(
        width=32, heads=2, mlp=48, layers=4, steps=4, epochs=1, samples=8, influence=8, windows=4, length=32, group=2,
        rank=2, seeds=1,
    ),
    "small": Config(),
    "paper": Config(
        model="meta-llama/Llama-2-7b-hf", length=2048, group=8, rank=128, samples=1024, windows=None, seeds=1
    ),
}  # fmt: skip


def settings(config: Config) -> dict[str, FuseConfig]:
    """The trained rows of the table: how each goes about it."""
    official = FuseConfig(
        rate=config.share, group_size=config.group, rank=config.rank, lora_rank=config.rank, epochs=config.epochs,
        batch_size=config.batch, influence_sequences=config.influence, learning_rate=config.rate,
        coefficient_learning_rate=config.coefficient_rate,
    )  # fmt: skip
    alike = dataclasses.replace(official, learning_rate=config.coefficient_rate)
    alone = {"coefficient": "none"}
    return {
        "MI, low-rank updates": dataclasses.replace(official, **alone),
        "FuseGPT": official,
        "MI, low-rank updates, rates alike": dataclasses.replace(alike, **alone),
        "FuseGPT, rates alike": alike,
    }


def run(config: Config, out: Path) -> dict[str, Any]:
    """One row for each seed and way; written to `metrics.jsonl` as they come."""
    train_texts, test_texts = language.corpus(config.data, config.test)
    if config.model is not None:
        model, tokenizer = common.pretrained(config.model)
    else:
        names = ("vocab", "width", "layers", "heads", "mlp", "length", "steps")
        model, tokenizer = language.trained(train_texts, **{name: getattr(config, name) for name in names})
    windows = text.windows(language.stream(test_texts, tokenizer), config.length)[: config.windows]
    stream = language.stream(train_texts, tokenizer)
    ways, depth = settings(config), len(model.layers)
    count = next(iter(ways.values())).removed(depth)
    rows: list[dict[str, Any]] = []

    def record(seed: int, way: str, small: Any, removed: Any = ()) -> None:
        found = {"seed": seed, "way": way, "perplexity": perplexity(small, windows, config.length)}
        common.record(out, rows, found | {"removed": [int(i) for i in removed]})

    for seed in range(config.seeds):
        calibration = text.random_windows(stream, config.samples, config.length, seed=seed)
        few = calibration[: config.influence]
        victims = {
            "random": np.random.default_rng(seed).choice(depth, count, replace=False),
            "block influence": np.argsort(block_influence(model, few, batch_size=config.batch), kind="stable")[:count],
            "MI": one_by_one(model, few, config, count),
        }
        record(seed, "dense", model)
        for way, layers in victims.items():
            record(seed, way, remove_layers(model, layers), layers)
        for way, how in ways.items():
            fused = fuse_layers(model, calibration, how, key=jax.random.key(seed))
            record(seed, way, fused.model, fused.victims)
            if seed == 0 and way == "FuseGPT":
                print(fused)
                jf.save(fused.model, out / "model-fused", tokenizer=tokenizer)
    report(config, rows, out)
    return {"rows": rows, "won back": won_back(rows)}


def one_by_one(model: Any, ids: np.ndarray, config: Config, count: int) -> list[int]:
    """The layers that macro influence removes, measured anew after each, without any training."""
    kept = list(range(len(model.layers)))
    for _ in range(count):
        gone = [i for i in range(len(model.layers)) if i not in kept]
        small = remove_layers(model, gone) if gone else model
        kept.pop(int(np.argmin(macro_influence(small, ids, batch_size=config.batch))))
    return [i for i in range(len(model.layers)) if i not in kept]


def won_back(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """For each trained way, by seed: the share of the log-perplexity that removal by MI costs which is gone."""
    of = {(r["seed"], r["way"]): math.log(r["perplexity"]) for r in rows}
    trained = [way for way in dict.fromkeys(way for _, way in of) if way.startswith(("MI,", "FuseGPT"))]
    seeds = sorted({seed for seed, _ in of})
    return {
        way: [(of[s, "MI"] - of[s, way]) / (of[s, "MI"] - of[s, "dense"]) for s in seeds] for way in trained
    }  # fmt: skip


def report(config: Config, rows: list[dict[str, Any]], out: Path) -> None:
    """The table (mean and deviation over seeds) and the figure."""
    names = list(dict.fromkeys(r["way"] for r in rows))
    seen = {way: [r["perplexity"] for r in rows if r["way"] == way] for way in names}
    gone = won_back(rows)
    common.table(
        f"perplexity on held-out text, {config.share:.0%} of the layers removed",
        [
            {"way": way, "perplexity": common.mean_std(seen[way]), "won back": common.mean_std(gone.get(way, ()))}
            for way in names
        ],
    )

    def draw(fig: Any) -> None:
        axis = fig.subplots()
        means, errors = ([f(seen[way]) for way in names] for f in (np.mean, np.std))
        axis.barh(names[::-1], means[::-1], xerr=errors[::-1], color="tab:blue")
        axis.set(xlabel="perplexity on held-out text", xscale="log")

    common.figure(out / "figure.png", draw)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: an update of the first group of layers of `model` with the grafts of one of them. Every device does
    the whole of it: FuseGPT is not spread over a mesh."""
    from jaxformers import paths
    from jaxformers.compress import calibration, fusegpt_group
    from jaxformers.compress.depth import layers_of
    from jaxformers.dryrun import Step
    from jaxformers.dryrun_steps import config_dict, replicated, size

    if config.model is None:
        raise ValueError("model: this preset trains its own; name one to shrink, such as meta-llama/Llama-2-7b-hf")
    hf, how, kept = config_dict(config.model), settings(config)["FuseGPT"], []

    def build() -> Any:
        dtype = hf.get("dtype", hf.get("torch_dtype"))  # what the checkpoint is in
        model = jf.init(hf, head="causal_lm", key=jax.random.key(0), dtype=dtype)
        *group, victim = layers_of(model)[: config.group]
        donor = paths.flatten(victim.params)
        grafted = [fusegpt_group.graft(layer, donor, how, jax.random.key(layer.number)) for layer in group]
        dtypes = {path: leaf.dtype for path, leaf in donor.items()}
        kind, *state = fusegpt_group.begun(grafted, how, dtypes)
        kept.append(kind)
        u, context = calibration.embedder(model)({"input_ids": jnp.zeros((config.batch, config.length), jnp.int32)})
        return *state, context, u, u, jnp.zeros(2)

    args = replicated(jax.eval_shape(build), mesh)
    update = lambda *args: fusegpt_group.update(kept[0], *args)
    inputs = f"{config.batch} × {config.length:,} tokens"
    name = f"fusegpt of {config.group} layers of {config.model} on each device, {inputs}"
    return Step(name, update, args, (0, 1), parameters=size(paths.combine(args[0], args[2])), whole=True)


if __name__ == "__main__":
    common.main("fusegpt", PRESETS, run, step=step)
