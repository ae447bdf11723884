"""X-EcoMLA: what does a cache of a quarter of its size cost a language model, once it has been distilled?

A small llama learns the bytes of English text. Its attention is then replaced by latent attention, initialised by SVD
or at random, and each copy learns the distributions of the model it was made from for the same few steps; one learns
the text itself. Cross-entropy on held-out text, before and after, says what the smaller cache costs. Seeds differ in
the order of the text and in the random starts; the model that they begin from is one.

    python -m experiments.x_ecomla                 # small: minutes on two CPU cores, three seeds
    python -m experiments.x_ecomla paper --model meta-llama/Llama-3.2-1B-Instruct --data sft.jsonl --test held.txt

Data: `--data` text to learn and `--test` text to evaluate on (.txt or a table with a column text, .gz allowed; default:
wikitext2_small beside the repository, else the Python reference and the standard library's sources, whole files held
out). The model that is trained here reads bytes.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxformers as jf
from experiments import common, language
from jaxformers.compress.x_ecomla import LayerReport, cache_bytes, report_table, upcycle_mla
from jaxformers.data import batches, text
from jaxformers.evaluation import perplexity
from jaxformers.models import llama
from jaxformers.train import OptimConfig, TrainConfig, fit
from jaxformers.train.distil import distil_logits, distil_objective
from jaxformers.train.text import next_tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """`model`: a checkpoint to convert; None trains a llama of the sizes below. `teacher`: another one to learn from.

    `ranks`: those of keys and values to try, the first one also from a random start and on the text alone. `energy`:
    the share of energy by which one more copy chooses its ranks; None leaves it out. `chunk`: positions of each
    sequence whose logits exist at a time.
    """

    data: Path | None = None
    test: Path | None = None
    model: str | None = None
    teacher: str | None = None
    width: int = 96
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    source_steps: int = 500
    source_rate: float = 3e-3
    d_n: int = 12
    d_r: int = 12
    query_rank: int = 96
    ranks: tuple[int, ...] = (12, 32)
    rank_divisor: int = 4
    energy: float | None = None
    length: int = 64
    batch: int = 16
    steps: int = 200
    rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    compute_dtype: str | None = None
    chunk: int | None = None
    windows: int | None = 512
    seeds: int = 3


PRESETS = {
    "smoke": Config(
        width=32, layers=2, mlp=32, source_steps=3, d_n=4, d_r=4, query_rank=32, ranks=(4,), length=16,
        batch=4, steps=3, windows=8, seeds=1,
    ),
    "small": Config(),
    "paper": Config(
        model="meta-llama/Llama-3.2-1B-Instruct", d_n=32, d_r=32, query_rank=1344, ranks=(128,), rank_divisor=8,
        length=2048, batch=192, steps=18_000, rate=8e-5, warmup=0.01, compute_dtype="bfloat16",
        chunk=64, windows=None, seeds=1,
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    """One row for each seed and way; written to `metrics.jsonl` as they come."""
    texts = ["\n\n".join(part) for part in language.corpus(config.data, config.test)]
    source, encode = None, lambda t: np.frombuffer(t.encode(), np.uint8)
    if config.model is not None:
        source, tokenizer = common.pretrained(config.model)
        encode = tokenizer.encode
    train_ids, test_ids = (np.asarray(encode(t), np.int32) for t in texts)
    windows = text.windows(test_ids, config.length)[: config.windows]
    source = trained(config, train_ids) if source is None else source
    teacher = source if config.teacher is None else jf.load(config.teacher)
    nats = lambda model: math.log(perplexity(model, windows, config.length))
    rows: list[dict[str, Any]] = []
    common.record(out, rows, {"way": "source", "seed": 0, "cache bytes": cache_bytes(source), "after": nats(source)})
    for seed in range(config.seeds):
        for way, options in ways(config).items():
            kl = options.pop("kl", 1.0)
            report: list[LayerReport] = []
            key = jax.random.key(seed) if options.get("init") == "random" else None
            student = upcycle_mla(
                source, d_n=config.d_n, d_r=config.d_r, query_rank=config.query_rank, key=key, report=report,
                rank_divisor=config.rank_divisor, **options,
            )  # fmt: skip
            before = nats(student)
            data = batches.token_batches(train_ids, config.length, config.batch, seed=seed + 1)
            settings = training(config, scan_layers=len({(r.query_rank, r.kv_rank) for r in report}) == 1)
            directory = out / f"{way}-{seed}".replace(" ", "-")
            done = distil_logits(
                teacher, student, data, settings, key=jax.random.key(seed), kl=kl, ce=1.0 - kl, chunk=config.chunk,
                directory=directory,
            )  # fmt: skip
            row = {"way": way, "seed": seed, "cache bytes": cache_bytes(student), "before": before}
            common.record(out, rows, {**row, "after": nats(done.model), "ranks": [r.kv_rank for r in report]})
            if seed == 0 and way == next(iter(ways(config))):
                print(report_table(report))
                jf.save(done.model, out / "model")
    found = summary(rows)
    label = "nats a token above the source, held-out text"
    others = {way: gaps for way, gaps in found["gaps"].items() if way != "source"}
    common.figure(out / "figure.png", lambda fig: common.bars(fig.subplots(), others, label), size=(6.4, 2.8))
    return {"rows": rows, **found}


def ways(config: Config) -> dict[str, dict[str, Any]]:
    """The rows of the table: name and options of `upcycle_mla`, and the weight of the teacher's distributions."""
    first = config.ranks[0]
    found: dict[str, dict[str, Any]] = {f"SVD, rank {rank}": {"kv_rank": rank} for rank in config.ranks}
    if config.energy is not None:
        found[f"SVD, energy {config.energy}"] = {"kv_energy": config.energy, "fixed_ends": False}
    found[f"random, rank {first}"] = {"kv_rank": first, "init": "random"}
    return found | {f"SVD, rank {first}, text alone": {"kv_rank": first, "kl": 0.0}}


def training(config: Config, **options: Any) -> TrainConfig:
    optim = OptimConfig(
        learning_rate=config.rate, schedule="cosine", warmup=config.warmup, weight_decay=config.weight_decay
    )
    every = max(1, config.steps // 10)
    return TrainConfig(
        steps=config.steps, optim=optim, compute_dtype=config.compute_dtype, log_every=every, progress=False, **options
    )


def trained(config: Config, ids: np.ndarray) -> nnx.Module:
    """A llama that has learnt the bytes ``ids``."""
    shape = llama.Config(
        vocab_size=256,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.mlp,
        max_position_embeddings=config.length,
        tie_word_embeddings=True,
    )
    optim = OptimConfig(learning_rate=config.source_rate, schedule="cosine", warmup=0.1)
    every = max(1, config.source_steps // 10)
    settings = TrainConfig(
        steps=config.source_steps, optim=optim, scan_layers=True, log_every=every, progress=False
    )
    data = batches.token_batches(ids, config.length, config.batch)
    model = jf.init(shape, head="causal_lm", key=jax.random.key(0))
    return fit(next_tokens, model, data, settings, key=jax.random.key(0)).model


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table (mean and deviation over seeds), and each way's gap to the source in nats a token, by seed."""
    source = rows[0]
    table, gaps = [], {}
    for way in dict.fromkeys(r["way"] for r in rows):
        own = [r for r in rows if r["way"] == way]
        gaps[way] = [r["after"] - source["after"] for r in own]
        table.append({
            "attention": way,
            "cache": common.mean_std(100 * r["cache bytes"] / source["cache bytes"] for r in own) + " %",
            "nats before": common.mean_std(r["before"] for r in own if "before" in r),
            "after": common.mean_std(r["after"] for r in own),
            "gap": common.mean_std(gaps[way]),
        })  # fmt: skip
    common.table("cross-entropy on held-out text, nats a token", table)
    return {"gaps": gaps}


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: the step that distils `teacher` into the converted `model`."""
    from jaxformers.dryrun_steps import Array, config_dict, train_step

    if config.model is None:
        raise ValueError("model: this preset trains its own; name one, such as meta-llama/Llama-3.2-1B-Instruct")
    kept: list[Any] = []

    def build() -> Any:
        make = lambda name: jf.init(config_dict(name), head="causal_lm", key=jax.random.key(0), dtype="bfloat16")
        source = make(config.model)
        teacher = source if config.teacher is None else make(config.teacher)
        student = upcycle_mla(
            source, d_n=config.d_n, d_r=config.d_r, query_rank=config.query_rank, kv_rank=config.ranks[0]
        )
        objective, params, freeze = distil_objective(
            teacher, student, chunk=config.chunk, scan_layers=True, remat="full"
        )
        kept.extend((objective, freeze))
        return params

    params = jax.eval_shape(build)
    train = dataclasses.replace(training(config), freeze=kept[1])
    ids = {"input_ids": Array((config.batch, config.length), jnp.int32)}
    name = f"x_ecomla of {config.model}, {config.batch} × {config.length:,} tokens"
    return train_step(name, kept[0], None, params, ids, train, mesh)


if __name__ == "__main__":
    common.main("x_ecomla", PRESETS, run, step=step)
