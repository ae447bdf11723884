"""Teacher Intervention: do ternary weights train faster when the teacher lends the student its attention?

A small BERT is fine-tuned to tell good film reviews from bad ones (SST-2). Students with ternary weights and 8-bit
activations begin from it and train for the same number of steps, plain (TernaryBERT's loss) or with the gradual
intervention in the first ones. All are evaluated without intervention, beside the teacher and the teacher whose weights
are made ternary without training.

    python -m experiments.teacher_intervention                 # small: minutes on two CPU cores, three seeds
    python -m experiments.teacher_intervention paper --task cola --data GLUE/CoLA       # as the paper has that task
    python -m experiments.teacher_intervention paper --task cola --data GLUE/CoLA --encoder None --teacher fine-tuned/

Data: with a `--task` of GLUE its directory; without one a directory with train.tsv and dev.tsv, sentence and label
(default: sst2_small beside the repository, else: from which package of the standard library is this line of code?).
`--teacher`: a checkpoint fine-tuned on it; `--encoder`: a pre-trained one, which is fine-tuned here first; without
either one of the sizes below begins from random weights.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxformers as jf
from experiments import common, glue, sentences
from experiments.sentences import encoded
from jaxformers.compress.teacher_intervention import TIConfig, ternary_kernels, ti_objective
from jaxformers.compress.teacher_intervention_qat import PAPER, qat
from jaxformers.data.tokenizers import Tokenizer, train_wordpiece
from jaxformers.train import OptimConfig, TrainConfig
from jaxformers.weights import fake_quantise


@dataclasses.dataclass(frozen=True)
class Config:
    """`steps`: of each student, `step1` of them with the intervention. `teacher_steps` and `teacher_rate`: of a teacher
    that is trained here. `dropout`: of the students; the teacher too where it is trained here. `shape`: the teacher's
    architecture, for dry runs. `rows`: of each table, at most. `step1_eval_every` None: as later. Lengths are in
    tokens, batches in rows. Where `steps` or `teacher_steps` are None they are `epochs` over the data; other fields
    that are None are the paper's for the `task`."""

    task: str | None = None
    teacher: str | None = None
    encoder: str | None = None
    shape: str | None = None
    data: Path | None = None
    interventions: tuple[str, ...] = ("none", "gradual")
    rows: int | None = 12_000
    vocab: int = 2000
    layers: int = 2
    width: int = 64
    heads: int = 4
    teacher_steps: int | None = 900
    teacher_rate: float = 1e-3
    dropout: float = 0.1
    length: int | None = 24
    batch: int | None = 32
    epochs: int = 3
    steps: int | None = 240
    step1: int | None = 60
    rate: float = 1e-3
    eval_every: int | None = 30
    step1_eval_every: int | None = None
    seeds: int = 3


_PAIRS = {"batch": 32, "length": 128, "step1": 60}  # of tokens, as in the authors' scripts
TASKS = {
    "cola": {"batch": 16, "length": 64, "step1": 120, "eval_every": 50},
    "sst2": {"batch": 32, "length": 64, "step1": 60, "eval_every": 100},
    "mrpc": {**_PAIRS, "eval_every": 50},
    "stsb": {**_PAIRS, "eval_every": 100},
    "qqp": {**_PAIRS, "eval_every": 1000},
    "mnli": {**_PAIRS, "eval_every": 8000},
    "mnli_mismatched": {**_PAIRS, "eval_every": 8000},
    "qnli": {**_PAIRS, "eval_every": 1000},
    "rte": {**_PAIRS, "eval_every": 20},
}
NEEDED = ("batch", "length", "step1", "eval_every")
PRESETS = {
    "smoke": Config(
        rows=64, vocab=200, layers=1, width=16, teacher_steps=4, length=8, batch=32, steps=5, step1=3, eval_every=5,
        interventions=("map",), seeds=1, dropout=0.0,
    ),
    "small": Config(),
    "paper": Config(
        task="sst2", encoder="google-bert/bert-base-uncased", shape="bert-base-uncased", rows=None, length=None,
        batch=None, steps=None, teacher_steps=None, teacher_rate=2e-5, step1=None, rate=2e-5, eval_every=None,
        step1_eval_every=10,
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> dict[str, Any]:
    glue.classes_only(config.task, "Teacher Intervention")
    config = glue.filled(config, TASKS, NEEDED)
    if config.task is None:
        data = sentences.labelled_texts(config.data, config.rows)
    else:
        data = {"task": config.task, **glue.read(config.data, config.task, ("train", "dev"), config.rows)}
    passes = glue.steps_of(None, config.epochs, len(data["train"][1]), config.batch)
    config = dataclasses.replace(
        config, steps=passes if config.steps is None else config.steps,
        teacher_steps=passes if config.teacher_steps is None else config.teacher_steps,
    )  # fmt: skip
    teacher, tokenizer = teacher_of(config, data["train"])
    own = glue.outputs_of(config.task, teacher)
    train, dev = (
        glue.rows(config.task, tokenizer, data[part], config.length, outputs=own) for part in ("train", "dev")
    )
    main = glue.main_score(config.task)
    quality = lambda model: glue.quality(config.task, model, dev, data["dev"], batch=config.batch, outputs=own)
    ready = fake_quantise(teacher, ternary_kernels(teacher), inputs=TIConfig().inputs, attention=TIConfig().attention)
    found = {
        "teacher": quality(teacher)[main],
        "ternary without training": quality(ready)[main],
    }

    rows, curves = [], {}
    for seed in range(config.seeds):
        for name in config.interventions:
            place = out / f"{name}-{seed}"
            training = TrainConfig(
                steps=config.steps,
                optim=dataclasses.replace(PAPER, learning_rate=config.rate),
                eval_every=config.eval_every,
                log_every=config.eval_every,
            )
            done = qat(
                teacher, train.data, out / "student" if (name, seed) == (config.interventions[-1], 0) else None,
                key=jax.random.key(seed), train=training, config=TIConfig(name, step1=config.step1),
                batch_size=config.batch, heldout=dev.data, directory=place, step1_eval_every=config.step1_eval_every,
                metric=lambda logits, labels: glue.scored(config.task, logits, dev, data["dev"], own),
            )  # fmt: skip
            curve = []
            for stage, before in (("step1", 0), ("step2", len(done.modes))):
                curve += [
                    {"step": before + r["step"], **{k: v for k, v in r.items() if k.startswith("eval_")}}
                    for r in done.history[stage] if r["kind"] == "eval"
                ]  # fmt: skip
            curves.setdefault(name, []).append(curve)
            row = {"intervention": name, "seed": seed, **curve[-1]}
            row["packed"] = quality(done.packed)[main]
            common.record(out, rows, row)

    names = glue.score_names(config.task)
    table = [{"student": name, main: value} for name, value in found.items()]
    for name in config.interventions:
        mine = [r for r in rows if r["intervention"] == name]
        early = [sum(p[f"eval_{main}"] for p in c if p["step"] <= 200) / max(sum(p["step"] <= 200 for p in c), 1)
                 for c in curves[name]]  # fmt: skip
        table.append({
            "student": name, **{m: common.mean_std(r[f"eval_{m}"] for r in mine) for m in names},
            f"mean {main} up to step 200": common.mean_std(early),
            "loss": common.mean_std(r["eval_loss"] for r in mine),
            "zeros": common.mean_std(r["eval_zeros"] for r in mine),
        })  # fmt: skip
    common.table(f"{data['task']}, {config.steps} steps, {config.seeds} seeds, evaluated without intervention", table)
    common.figure(out / "figure.png", lambda fig: draw(fig, curves, found, main), size=(9, 3.6))
    return {"task": data["task"], **found, "rows": rows, "curves": curves}


def teacher_of(config: Config, train: sentences.Texts) -> tuple[nnx.Module, Tokenizer]:
    """A fine-tuned checkpoint as it is, or a pre-trained encoder or a new BERT, trained on the task."""
    if config.teacher is not None and config.encoder is not None:
        raise ValueError("teacher, encoder: give one of them")
    rates = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    if config.teacher is not None:
        return common.pretrained(config.teacher, **rates)
    head, key = glue.head_of(config.task, train), jax.random.key(1234)
    if config.encoder is not None:
        model, tokenizer = common.pretrained(config.encoder, **head, key=key, **rates)
    else:
        tokenizer = train_wordpiece(glue.texts_of(train), config.vocab, max_length=config.length)
        sizes = {name: getattr(config, name) for name in ("width", "layers", "heads", "length", "dropout")}
        model = sentences.new_classifier(tokenizer, head["num_labels"], **sizes, key=key)
    training = TrainConfig(
        steps=config.teacher_steps,
        optim=OptimConfig(learning_rate=config.teacher_rate, warmup=0.1, weight_decay=0.01),
        log_every=max(config.teacher_steps // 20, 1),
    )
    rows = encoded(tokenizer, train, config.length)
    loss = glue.loss_of(config.task)
    return sentences.trained(model, rows, config.batch, training, key=jax.random.key(1), loss=loss), tokenizer


def draw(fig: Any, curves: dict[str, list], found: dict[str, float], main: str) -> None:
    left, right = fig.subplots(1, 2)
    for i, (name, runs) in enumerate(curves.items()):
        for k, curve in enumerate(runs):
            steps = [p["step"] for p in curve]
            label = name if k == 0 else None
            left.plot(steps, [p["eval_loss"] for p in curve], f"C{i}", alpha=0.7, label=label)
            right.plot(steps, [100 * p[f"eval_{main}"] for p in curve], f"C{i}", alpha=0.7, label=label)
    left.set(xlabel="step", ylabel="held-out loss", yscale="log")
    right.axhline(100 * found["teacher"], color="k", linestyle="--", linewidth=1, label="teacher")
    right.axhline(100 * found["ternary without training"], color="0.6", linestyle=":", label="without training")
    right.set(xlabel="step", ylabel=f"{main}, %")
    for axis in (left, right):
        axis.legend(frameon=False)


def step(config: Config, mesh: Any) -> Any:
    """For dry runs: a step of the student without intervention, the teacher's forward pass included."""
    from jaxformers.dryrun_steps import Array, config_dict, train_step

    if config.shape is None:
        raise ValueError("shape: this preset trains its own teacher; name one, such as bert-base-uncased")
    glue.classes_only(config.task, "Teacher Intervention")
    config = glue.filled(config, TASKS, NEEDED)
    steps = config.steps or glue.steps_of(None, config.epochs, glue.rows_of(config.task), config.batch)
    kept: list[Any] = []

    def build() -> Any:
        teacher = jf.init(config_dict(config.shape), head="sequence_classification", key=jax.random.key(0))
        rules = TIConfig()
        student = fake_quantise(teacher, ternary_kernels(teacher), inputs=rules.inputs, attention=rules.attention)
        objective, params, freeze = ti_objective(teacher, student)
        kept.extend((objective, freeze))
        return params

    params = jax.eval_shape(build)
    train = TrainConfig(steps=steps, freeze=kept[1], optim=dataclasses.replace(PAPER, learning_rate=config.rate))
    ids = Array((config.batch, config.length), jnp.int32)
    name = f"teacher_intervention, {config.shape}, {config.batch} × {config.length} tokens"
    return train_step(name, kept[0], None, params, {"input_ids": ids, "attention_mask": ids}, train, mesh)


if __name__ == "__main__":
    common.main("teacher_intervention", PRESETS, run, step=step)
