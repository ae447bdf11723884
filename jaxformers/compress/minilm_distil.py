"""MiniLM's recipe: a teacher's checkpoint and plain text in, a small encoder's checkpoint out.

The loss is that of `jaxformers.compress.minilm`. Students are initialised at random, as in the paper, or from the
teacher's layers. With an assistant (arXiv 2002.10957, section 3.4) the teacher of L layers and width d first teaches a
model of L layers and the student's width, and that one teaches the student; the paper does so where the student has at
most half of both.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import hub, paths
from jaxformers.compress.minilm import MiniLMConfig, check_models, is_causal, minilm_objective
from jaxformers.data.batches import array_batches, heldout_batches
from jaxformers.data.text import join_documents, pack_blocks, read_texts, windows
from jaxformers.data.tokenizers import Tokenizer, load_tokenizer
from jaxformers.functional import functional, with_params
from jaxformers.models import bert
from jaxformers.train.distil import TEACHER
from jaxformers.train.loop import TrainConfig, fit
from jaxformers.train.optim import OptimConfig

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """Sizes of a student: a BERT with the teacher's vocabulary, or for a decoder a smaller one of the teacher's kind.

    `heads` None: the teacher's (v1 needs as many). `intermediate` None: 4 * hidden. `init`: "random", or "teacher" to
    copy the embeddings and `layers` evenly spaced layers, the last one among them; every size but the depth must then
    be the teacher's.
    """

    layers: int
    hidden: int
    heads: int | None = None
    intermediate: int | None = None
    init: str = "random"
    dropout: float = 0.1

    def __post_init__(self):
        if self.init not in ("random", "teacher"):
            raise ValueError(f"init: must be 'random' or 'teacher', got {self.init!r}")
        if self.layers < 1:
            raise ValueError(f"layers: must be >= 1, got {self.layers}")


# The paper's schedule for students narrower than 768 (6 x 768: batch 1024 at 5e-4).
PAPER = TrainConfig(steps=400_000, optim=OptimConfig(learning_rate=3e-4, warmup=4000, weight_decay=0.01))


@dataclasses.dataclass(frozen=True)
class Distilled:
    """`student` and, if there was one, `assistant` (nnx models), how that was decided, and the records of training."""

    student: nnx.Module
    assistant: nnx.Module | None
    decision: str
    history: dict[str, list[dict[str, Any]]]


def distil(
    teacher: str | Path | nnx.Module,
    student: StudentConfig | Any,
    corpus: Any,
    out: str | Path | None = None,
    *,
    key: jax.Array,
    config: MiniLMConfig = MiniLMConfig(),
    train: TrainConfig = PAPER,
    assistant: StudentConfig | str | None = None,
    tokenizer: Tokenizer | None = None,
    max_length: int = 512,
    batch_size: int = 256,
    heldout: Any = None,
    directory: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Distilled:
    """Compress `teacher` into `student` on unlabelled text; write the student to `out` as a Hugging Face checkpoint.

    Args:
        teacher: a checkpoint directory, a hub id, or a model. It runs without dropout and is left untouched.
        student: its sizes, or an architecture's whole Config (initialised at random).
        corpus: texts (a list of strings, or the path of a text file, .gz allowed, one document a line), packed to
            `max_length` tokens each; or batches {"input_ids", "attention_mask"} (B, L), as `fit` takes them, with what
            `minilm.teacher_rows` adds or without.
        assistant: a model in between that is distilled first, by the same loss and schedule: its sizes, or "auto" for
            one of the teacher's depth and the student's width where the student has at most half of both.
        heldout: for `eval_loss`, the loss on text not trained on: texts, or batches that can be gone through again.
        directory: where the stages keep metrics and checkpoints; a run found there is taken up again.

    Raises ValueError, before any compute, when the models do not fit together (see `check_models`), the tokenizer has
    ids that a vocabulary lacks, or `max_length` exceeds a position table.
    """
    if not isinstance(teacher, nnx.Module):
        teacher = hub.load(teacher, head=hub.NO_HEAD)
    reads_text = not _is_batches(corpus)
    packs_heldout = heldout is not None and not _is_batches(heldout)
    if tokenizer is None and (reads_text or packs_heldout):
        if teacher.source is None:
            raise ValueError("tokenizer: the teacher has no directory to read one from; pass tokenizer=")
        tokenizer = load_tokenizer(teacher.source)

    sizes = {"student": student}
    between, decision = _assistant(teacher, student, assistant)
    if between is not None:
        sizes = {"assistant": between, **sizes}
    log.info("assistant: %s", decision)
    keys = dict(zip(sizes, jax.random.split(key, (len(sizes), 2)), strict=True))
    models = {name: student_model(teacher, size, keys[name][0]) for name, size in sizes.items()}
    chain = [teacher, *models.values()]
    stages = [_stage(config, first=i == 0, last=i == len(models) - 1) for i in range(len(models))]
    for above, below, stage in zip(chain, chain[1:], stages, strict=False):
        check_models(above, below, stage)
    for name, model in zip(("teacher", *models), chain, strict=True):
        _check_text(name, model, tokenizer, max_length if reads_text else None)

    data = corpus if not reads_text else array_batches(pack(corpus, tokenizer, max_length), batch_size)
    held = heldout
    if packs_heldout:
        held = heldout_batches(pack(heldout, tokenizer, max_length), batch_size)
    history = {}
    for above, (name, below), stage in zip(chain, models.items(), stages, strict=False):
        options = {"scan_layers": train.scan_layers, "remat": train.remat}
        objective, params, freeze = minilm_objective(above, below, stage, **options)
        if above is not teacher:
            objective = _without_teacher(objective)
        run = dataclasses.replace(train, freeze=(*train.freeze, *freeze), scan_layers=False, remat=None)
        place = None if directory is None else Path(directory) / name
        result = fit(objective, params, data, run, key=keys[name][1], eval_data=held, directory=place, mesh=mesh)
        models[name] = with_params(below, result.params["student"])
        history[name] = result.history
        chain[list(models).index(name) + 1] = models[name]
    if out is not None:
        hub.save(models["student"], out, tokenizer=tokenizer)
    return Distilled(models["student"], models.get("assistant"), decision, history)


def student_model(teacher: nnx.Module, student: StudentConfig | Any, key: jax.Array) -> nnx.Module:
    """A student for `teacher`, initialised as `student` says. Raises ValueError for sizes that cannot be."""
    if not isinstance(student, StudentConfig):
        return hub.init(student, key=key)
    t = teacher.config
    heads = student.heads or t.num_attention_heads
    if student.hidden % heads:
        raise ValueError(f"heads: {heads} do not divide the student's width {student.hidden}")
    sizes = {
        "hidden_size": student.hidden,
        "num_hidden_layers": student.layers,
        "num_attention_heads": heads,
        "intermediate_size": student.intermediate or 4 * student.hidden,
        "hidden_dropout_prob": student.dropout,
        "attention_probs_dropout_prob": student.dropout,
    }
    if is_causal(teacher):
        names = {f.name for f in dataclasses.fields(t)}
        config = dataclasses.replace(t, **{k: v for k, v in sizes.items() if k in names}, hf="{}")
    else:
        positions, vocab, pad = _positions(teacher), t.vocab_size, t.pad_token_id
        config = bert.Config(vocab, max_position_embeddings=positions, pad_token_id=pad, pooler=False, **sizes)
    model = hub.init(config, key=key)
    return model if student.init == "random" else _copy_layers(teacher, model)


def _copy_layers(teacher: nnx.Module, student: nnx.Module) -> nnx.Module:
    """`student` with the teacher's embeddings and M of its L layers: (i + 1) L / M for i = 0 .. M - 1, 1-based."""
    depth, kept = len(teacher.layers), len(student.layers)
    if kept > depth:
        raise ValueError(f"init: the teacher has {depth} layers to copy, the student wants {kept}")
    source = paths.flatten(functional(teacher)[1])
    target = paths.flatten(functional(student)[1])
    chosen = {str(i): str((i + 1) * depth // kept - 1) for i in range(kept)}
    copied = {}
    for path, old in target.items():
        first, *rest = path.split(".")
        origin = ".".join(["layers", chosen[rest[0]], *rest[1:]]) if first == "layers" else path
        new = source.get(origin)
        if new is not None and path == "embeddings.position.embedding":
            new = new[-old.shape[0] :]  # RoBERTa's table begins with rows for padding
        if new is not None and path == "embeddings.token_type.embedding" and new.shape[0] < old.shape[0]:
            new = jnp.broadcast_to(new[:1], old.shape)
        if new is None and path == "embeddings.token_type.embedding":
            new = jnp.zeros_like(old)
        if new is None or new.shape != old.shape:
            found = "nothing" if new is None else new.shape
            raise ValueError(f"init: 'teacher' needs equal sizes; {path} is {old.shape}, the teacher has {found}")
        copied[path] = new
    return with_params(student, paths.unflatten(copied))


def _assistant(teacher: nnx.Module, student: Any, assistant: Any) -> tuple[StudentConfig | None, str]:
    """The assistant's sizes or None, and why."""
    if assistant is None or isinstance(assistant, StudentConfig):
        return assistant, "none asked for" if assistant is None else "given"
    if assistant != "auto":
        raise ValueError(f"assistant: must be None, 'auto' or a StudentConfig, got {assistant!r}")
    deep, wide = len(teacher.layers), teacher.config.hidden_size
    whole = not isinstance(student, StudentConfig)
    layers, hidden = (student.num_hidden_layers, student.hidden_size) if whole else (student.layers, student.hidden)
    heads = student.num_attention_heads if whole else student.heads
    sizes = f"student {layers} x {hidden}, teacher {deep} x {wide}"
    if layers > deep / 2 or hidden > wide / 2:
        return None, f"none: {sizes} (needs at most half of both)"
    dropout = 0.1 if whole else student.dropout
    return StudentConfig(deep, hidden, heads, dropout=dropout), f"{deep} x {hidden}: {sizes}"


def _stage(config: MiniLMConfig, *, first: bool, last: bool) -> MiniLMConfig:
    """Chosen layers belong to the two ends of the chain: an assistant is imitated, and imitates, at its last layer."""
    above, below = config.teacher_layer if first else None, config.student_layer if last else None
    return dataclasses.replace(config, teacher_layer=above, student_layer=below)


def _without_teacher(objective: Any) -> Any:
    """`objective` where batches hold what another model than this stage's teacher shows."""

    def asked_anew(apply, params, batch, key):
        return objective(apply, params, {k: v for k, v in batch.items() if not k.startswith(TEACHER)}, key)

    return asked_anew


def _positions(model: nnx.Module) -> int:
    """Longest input."""
    return getattr(model.config, "max_length", model.config.max_position_embeddings)


def _check_text(name: str, model: nnx.Module, tokenizer: Tokenizer | None, length: int | None) -> None:
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: it has {tokenizer.vocab_size} ids, the {name}'s vocabulary {model.config.vocab_size}; "
            "teacher and student must share the tokenizer's vocabulary"
        )
    if length is not None and length > _positions(model):
        raise ValueError(f"max_length: {length} tokens exceed the {name}'s {_positions(model)} positions")


def _is_batches(corpus: Any) -> bool:
    if isinstance(corpus, str | Path):
        return False
    if not isinstance(corpus, Iterable):
        raise ValueError(f"corpus: expected texts, a path or batches, got {type(corpus).__name__}")
    if iter(corpus) is corpus:
        return True  # may be gone through only once: not by us
    return not isinstance(next(iter(corpus), ""), str)


def pack(corpus: Any, tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    """Texts one after another, cut into rows of `length` tokens, framed by [CLS] and [SEP] where the tokenizer does so.

    -> input_ids, attention_mask (rows, length) int32. Texts may be a file's path (see `data.text.read_texts`); blank
    ones are dropped. Raises ValueError when there is no text, or (without a frame) less than one row of it.
    """
    texts = read_texts(corpus) if isinstance(corpus, str | Path) else corpus
    documents = [tokenizer.encode(t, add_special_tokens=False) for t in texts if t.strip()]
    if not documents:
        raise ValueError("corpus: it holds no text")
    if tokenizer.cls_id is not None and tokenizer.sep_id is not None:
        frame = {"cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id, "pad_id": tokenizer.pad_id}
        return pack_blocks(documents, length, **frame)
    ids = windows(join_documents(documents, tokenizer.eos_id), length)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
