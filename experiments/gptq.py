"""GPTQ: how much of the quality that rounding to few bits costs does second-order compensation save?

A small language model is trained, then quantised at 4, 3 and 2 bits by rounding to nearest (RTN) and by GPTQ: with one
grid per output, in the order of decreasing activation, and with a grid per group of inputs. Perplexity on held-out text
says what each costs.

    python -m experiments.gptq                     # small: minutes on two CPU cores, three seeds
    python -m experiments.gptq paper --model facebook/opt-125m --data c4.jsonl --test wiki.test.raw

Data: `--data` text to train and calibrate on and `--test` text to evaluate on (.txt or a table with a column text, .gz
allowed; default: wikitext2_small beside the repository, else the Python reference and the standard library's sources,
whole files held out).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common, language
from jaxformers.compress.gptq import gptq
from jaxformers.data import text
from jaxformers.data.tokenizers import Tokenizer
from jaxformers.evaluation import perplexity


@dataclasses.dataclass(frozen=True)
class Config:
    """`model`: a checkpoint to quantise; None trains a llama of the sizes below. `group`: inputs that share a grid."""

    data: Path | None = None
    test: Path | None = None
    model: str | None = None
    vocab: int = 1024
    width: int = 128
    layers: int = 3
    heads: int = 4
    mlp: int = 384
    length: int = 128
    batch: int = 8
    steps: int = 400
    rate: float = 3e-3
    bits: tuple[int, ...] = (4, 3, 2)
    group: int = 32
    samples: int = 64
    windows: int | None = 200
    seeds: int = 3


PRESETS = {
    "smoke": Config(width=64, heads=2, mlp=64, layers=1, steps=4, bits=(3,), samples=4, windows=4, length=32, seeds=1),
    "small": Config(),
    "paper": Config(model="facebook/opt-125m", length=2048, samples=128, windows=None, group=128, seeds=1),
}


def ways(config: Config) -> dict[str, dict[str, Any]]:
    """The rows of the table: name and options of `gptq`."""
    return {
        "RTN": {"method": "rtn"},
        "GPTQ": {},
        "GPTQ, act-order": {"act_order": True, "true_sequential": True},
        f"GPTQ, groups of {config.group}": {"group_size": config.group},
    }


def run(config: Config, out: Path) -> dict[str, Any]:
    """One row for each seed, number of bits and way; written to `metrics.jsonl` as they come."""
    train_text, test_text = language.corpus(config.data, config.test)
    rows: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        model, tokenizer = start(config, train_text, seed)
        train_ids, test_ids = (language.stream(texts, tokenizer) for texts in (train_text, test_text))
        windows = text.windows(test_ids, config.length)[: config.windows]
        calibration = text.random_windows(train_ids, config.samples, config.length, seed=seed)
        dense = perplexity(model, windows, config.length)
        common.record(out, rows, {"seed": seed, "bits": 32, "way": "dense", "perplexity": dense})
        for bits in config.bits:
            for way, options in ways(config).items():
                small = gptq(model, calibration, bits=bits, **options)
                found = perplexity(small, windows, config.length)
                common.record(out, rows, {"seed": seed, "bits": bits, "way": way, "perplexity": found})
        if seed == 0:
            jf.save(gptq(model, calibration, bits=4, group_size=config.group), out / "model-4bit", tokenizer=tokenizer)
    report(config, rows, out)
    return {"rows": rows, "excess removed": removed(config, rows)}


def start(config: Config, texts: list[str], seed: int) -> tuple[nnx.Module, Tokenizer]:
    """The model to quantise: the one that is named, or a llama trained on ``texts``; and its tokenizer."""
    if config.model is not None:
        return common.pretrained(config.model)
    names = ("vocab", "width", "layers", "heads", "mlp", "length", "batch", "steps", "rate")
    return language.trained(texts, seed=seed, **{name: getattr(config, name) for name in names})


def removed(config: Config, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """For each way and number of bits, the share of RTN's excess perplexity over dense that is gone, by seed."""
    of = {(r["seed"], r["bits"], r["way"]): r["perplexity"] for r in rows}
    shares: dict[str, list[float]] = {}
    for (seed, bits, way), found in of.items():
        if way in ("dense", "RTN"):
            continue
        dense, rtn = of[seed, 32, "dense"], of[seed, bits, "RTN"]
        shares.setdefault(f"{way}, {bits} bits", []).append((rtn - found) / (rtn - dense))
    return shares


def report(config: Config, rows: list[dict[str, Any]], out: Path) -> None:
    """The table (mean and deviation over seeds) and the figure."""
    seen = lambda bits, way: [r["perplexity"] for r in rows if r["bits"] == bits and r["way"] == way]
    dense = seen(32, "dense")
    table = [{"way": "dense", **{f"{bits} bits": common.mean_std(dense) for bits in config.bits}}]
    table += [
        {"way": way, **{f"{bits} bits": common.mean_std(seen(bits, way)) for bits in config.bits}}
        for way in ways(config)
    ]
    common.table("perplexity on held-out text", table)

    def draw(fig: Any) -> None:
        axis = fig.subplots()
        axis.axhline(np.mean(dense), color="grey", linewidth=1, label="dense")
        for way in ways(config):
            found = [seen(bits, way) for bits in config.bits]
            axis.errorbar(config.bits, np.mean(found, axis=1), np.std(found, axis=1), marker="o", capsize=3, label=way)
        axis.set(xlabel="bits a weight", ylabel="perplexity on held-out text", yscale="log", xticks=config.bits)
        axis.legend()

    common.figure(out / "figure.png", draw)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs, what quantising one block of `model` compiles to: the Hessians of a batch of 8 calibration
    sequences, and the solution of all layers. Every device does the whole of it: GPTQ is not spread over a mesh."""
    from jaxformers import sites, surgery
    from jaxformers.compress import calibration, columns, hessian
    from jaxformers.compress.grids import Grid
    from jaxformers.dryrun import Step
    from jaxformers.dryrun_steps import Array, config_dict, replicated, size

    if config.model is None:
        raise ValueError("model: this preset trains its own; name one to quantise, such as facebook/opt-125m")
    settings = jf.models.architecture(config_dict(config.model)["model_type"]).Config.from_hf(config_dict(config.model))
    kept: list[Any] = []

    def build() -> Any:
        model = jf.init(settings, head="causal_lm", key=jax.random.key(0))
        graph, state = nnx.split(surgery.named(nnx.clone(model.layers[0])))
        kept.append(graph)
        return state

    def quantised(state: Any, x: jax.Array) -> Any:
        linears = calibration.linears_of(nnx.merge(kept[0], state))
        run = lambda: nnx.merge(kept[0], state)(x, mask=jf.nn.Mask(causal=True))
        _, seen = sites.reap(run, "**.input")()
        found = {}
        for name, module in linears.items():
            kernel, inputs = module.kernel.get_value(), seen[f"{name}.input"]
            H, _ = hessian.accumulate(jax.numpy.zeros((kernel.shape[0],) * 2), jax.numpy.float32(0), inputs, None)
            found[name] = columns.solve(kernel, H, grid=Grid(config.bits[0]), group_size=config.group)
        return found

    state = jax.eval_shape(build)
    x = Array((8, config.length, settings.hidden_size), jax.numpy.float32)
    name = f"gptq of one block of {config.model} on each device, 8 × {config.length:,} tokens"
    return Step(name, quantised, (replicated(state, mesh), replicated(x, mesh)), parameters=size(state), whole=True)


if __name__ == "__main__":
    common.main("gptq", PRESETS, run, step=step)
