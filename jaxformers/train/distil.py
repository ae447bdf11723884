"""Distillation: a student learns to show, at chosen points, what a frozen teacher shows.

    L = kl T^2 KL(p_teacher || p_student) + ce CE(next token)  +  sum_sites weight loss(teacher's, student's values)

`imitation` is the mechanism: two models in one parameter tree, {"student", "teacher"}, of which the teacher is run
without dropout, gradient or update. `distil_objective` is the formula above over it, and `distil_logits` a recipe that
runs it through `jaxformers.train.fit`. Systems that compare something else at the sites bring their own loss.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import paths
from jaxformers.functional import functional, split_head, with_params
from jaxformers.mesh import constrained
from jaxformers.sites import reap
from jaxformers.surgery import natural
from jaxformers.token_losses import next_labels, token_terms
from jaxformers.train.config import TrainConfig
from jaxformers.train.loop import Objective, fit

TEACHER = "teacher."  # before the names of a batch's arrays that `teacher_rows` made
FROZEN = ("teacher.**",)


class View(NamedTuple):
    """What one of the two models shows of a batch. ``output``: an `Output`, None for a teacher that was not run;
    ``seen``: the values at its sites; ``head``: hidden states to logits, where `imitation` was told to split."""

    output: Any
    seen: dict[str, jax.Array]
    head: Callable[[jax.Array], jax.Array] | None


Loss = Callable[[View, View, Mapping[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]


def imitation(
    teacher: nnx.Module,
    student: nnx.Module,
    loss: Loss,
    *,
    teacher_sites: paths.Patterns = (),
    student_sites: paths.Patterns = (),
    split: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    **options: Any,
) -> tuple[Objective, dict[str, Any], tuple[str, ...]]:
    """``(objective, params, freeze)`` for `jaxformers.train.fit`: ``loss(teacher's View, student's View, batch)``.

        objective, params, freeze = imitation(teacher, student, loss, …)
        result = fit(objective, params, batches, TrainConfig(steps=…, freeze=freeze), key=key)
        student = jf.with_params(student, result.params["student"])

    A batch may hold arrays ``teacher.<site>`` (see `teacher_rows`); the teacher is then not run. Entries that neither
    model takes (labels) are for the loss. ``split``: outputs have no logits; ``View.head`` makes them, see
    :func:`jaxformers.functional.split_head`. ``mesh``: the one that `fit` is going to be given: activations of both
    models then follow the batch (:func:`jaxformers.mesh.constrained`). ``options`` (scan_layers, remat) go to the
    student.
    """
    asked = paths.as_tuple(teacher_sites)
    look_at_teacher, teacher_params = _viewer(teacher, asked, split, mesh)
    look_at_student, student_params = _viewer(student, paths.as_tuple(student_sites), split, mesh, **options)

    def objective(apply: Any, params: dict[str, Any], batch: Mapping[str, jax.Array], key: jax.Array | None):
        given = {name.removeprefix(TEACHER): x for name, x in batch.items() if name.startswith(TEACHER)}
        missing = [pattern for pattern in asked if given and not any(paths.matches(pattern, name) for name in given)]
        if missing:
            raise ValueError(f"batch: it holds other sites of the teacher than {missing[0]!r}; see teacher_rows")
        if given:
            above = View(None, jax.lax.stop_gradient(given), None)
        else:
            above = look_at_teacher(jax.lax.stop_gradient(params["teacher"]), batch, None)
        return loss(above, look_at_student(params["student"], batch, key), batch)

    return objective, {"student": student_params, "teacher": teacher_params}, FROZEN


def _viewer(
    model: nnx.Module, sites: tuple[str, ...], split: bool, mesh: jax.sharding.Mesh | None, **options: Any
) -> tuple[Callable[[Any, Mapping[str, jax.Array], jax.Array | None], View], Any]:
    """``(look, params)``: ``look(params, batch, key)`` is what ``model`` shows of the entries of ``batch`` it takes."""
    if split:
        apply, head, params = split_head(model, **options)
    else:
        (apply, params), head = functional(model, **options), None
    apply = apply if mesh is None else constrained(apply, mesh)
    watch = reap(apply, sites) if sites else lambda *args, **kwargs: (apply(*args, **kwargs), {})
    known = set(inspect.signature(type(model).__call__).parameters)

    def look(params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> View:
        output, seen = watch(params, {name: x for name, x in batch.items() if name in known}, rngs=key)
        return View(output, seen, None if head is None else lambda hidden: head(params, hidden))

    return look, params


def teacher_rows(
    teacher: nnx.Module,
    rows: Mapping[str, Any],
    sites: paths.Patterns,
    *,
    inputs: Iterable[str] = ("input_ids", "attention_mask"),
    batch_size: int = 32,
    dtype: str = "float16",
) -> dict[str, np.ndarray]:
    """``rows`` ({name: (n, …)}), and the values at ``sites`` of ``teacher`` there, computed once and for all.

    The teacher is the larger part of a step's work: a corpus that is gone through several times, or by several
    students, is better asked about once. Added are arrays ``teacher.<site>`` (n, …) in ``dtype``, all kept in memory.
    Raises ValueError for a pattern that matches no site.
    """
    apply, params = functional(teacher)
    watch = reap(apply, sites)
    seen = jax.jit(lambda params, part: {k: x.astype(dtype) for k, x in watch(params, part)[1].items()})
    found: dict[str, np.ndarray] = {}
    n = len(rows["input_ids"])
    for start in range(0, n, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), n - 1)  # one shape; the last batch repeats a row
        part = {name: rows[name][index] for name in inputs if name in rows}
        for name, x in jax.device_get(seen(params, part)).items():
            into = found.setdefault(TEACHER + name, np.empty((n, *x.shape[1:]), x.dtype))
            into[start : start + batch_size] = x[: n - start]
    return {**rows, **found}


# ---- logits and sites ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SiteLoss:
    """One term over the sites that a pattern matches: ``weight`` times the mean over them of ``loss``.

    ``loss(teacher's value, student's value, mask)``: float32 (or wider) arrays of one site, the batch's attention_mask
    or None, to a scalar. ``teacher``: the pattern of the teacher's sites where they have other names; those of the two
    models are paired in the order of their names, ``"layers.{1,3}.output"`` with ``"layers.{0,1}.output"``.
    """

    loss: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
    weight: float = 1.0
    teacher: str | None = None

    def mean(self, pattern: str, teacher: Mapping[str, jax.Array], student: Mapping[str, jax.Array], mask: Any) -> Any:
        """The term, unweighted, for the student's ``pattern`` and what both models show ({site: value})."""
        theirs = [teacher[name] for name in _matching(self.teacher or pattern, teacher)]
        ours = [student[name] for name in _matching(pattern, student)]
        if len(theirs) != len(ours):
            raise ValueError(
                f"sites: {pattern!r} is {len(ours)} sites of the student, and {self.teacher or pattern!r} "
                f"{len(theirs)} of the teacher; they are compared one by one"
            )
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return sum(self.loss(wide(t), wide(s), mask) for t, s in zip(theirs, ours, strict=True)) / len(ours)


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if paths.matches(pattern, name)), key=natural)


def distil_objective(
    teacher: nnx.Module,
    student: nnx.Module,
    *,
    kl: float = 1.0,
    ce: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "token",
    sites: Mapping[str, SiteLoss] | None = None,
    chunk: int | None = None,
    **options: Any,
) -> tuple[Objective, dict[str, Any], tuple[str, ...]]:
    """The loss of the module's first paragraph as `imitation` returns it. Batches: input_ids, attention_mask (B, L).

    ``kl`` weighs T^2 KL(teacher || student) at every real position, ``ce`` the cross-entropy of every next token; 0
    leaves a term out. ``reduction``: "token" divides each by the number of its positions; "sequence" by that of the
    sequences alone, as torch's ``batchmean``: the loss grows with their length. ``sites``: {pattern of the student's
    sites: `SiteLoss`}. ``chunk``: positions of each sequence whose logits exist at a time, see
    :func:`jaxformers.token_losses.token_terms`. Metrics: ``kl``, ``ce``, each pattern's term, and ``weight``, the real
    positions (sequences). ``options`` (mesh, scan_layers, remat) go to `imitation`.

    Raises ValueError: vocabularies that differ, weights or a temperature out of range, nothing to learn from.
    """
    sites = dict(sites or {})
    weights = {"kl": kl, "ce": ce, **{pattern: term.weight for pattern, term in sites.items()}}
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name}: its weight must be a number of 0 or more, got {weight}")
    if not any(weights.values()):
        raise ValueError("kl, ce, sites: every weight is 0, there is nothing to learn from")
    if not temperature > 0:
        raise ValueError(f"temperature: must be > 0, got {temperature}")
    if reduction not in ("token", "sequence"):
        raise ValueError(f"reduction: expected 'token' or 'sequence', got {reduction!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected 1 or more positions, got {chunk}")
    if kl:
        check_vocabulary(teacher, student)
    logits = bool(kl or ce)

    def loss(above: View, below: View, batch: Mapping[str, jax.Array]):
        mask = batch.get("attention_mask")
        terms = {}
        if logits:
            if above.output is None:
                raise ValueError("batch: teacher_rows keeps sites, no logits; leave them out, or set kl and ce to 0")
            terms |= _logit_terms(above, below, batch, kl, ce, temperature, reduction, chunk)
        for pattern, term in sites.items():
            terms[pattern] = term.mean(pattern, above.seen, below.seen, mask)
        total = sum(weights[name] * value for name, value in terms.items())
        ids = batch["input_ids"]
        tokens = ids.size if mask is None else jnp.sum(mask)
        return total, {**terms, "weight": jnp.float32(tokens if reduction == "token" else len(ids))}

    theirs = [term.teacher or pattern for pattern, term in sites.items()]
    return imitation(teacher, student, loss, teacher_sites=theirs, student_sites=tuple(sites), split=logits, **options)


def _logit_terms(
    above: View,
    below: View,
    batch: Mapping[str, jax.Array],
    kl: float,
    ce: float,
    temperature: float,
    per: str,
    chunk: int | None,
) -> dict[str, jax.Array]:
    """The means of the terms that have a weight."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = next_labels(ids, mask) if ce else None
    other = {"teacher": above.output.last_hidden_state, "teacher_head": above.head} if kl else {}
    found = token_terms(
        below.output.last_hidden_state, below.head, labels=labels, temperature=temperature, chunk=chunk, **other
    )
    real = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    counted = {"kl": real, "nll": None if labels is None else labels >= 0}
    mean = lambda name: (
        jnp.sum(jnp.where(counted[name], found[name], 0.0))
        / (jnp.maximum(jnp.sum(counted[name]), 1) if per == "token" else len(ids))
    )
    return {"ce" if name == "nll" else name: mean(name) for name in found}


def check_vocabulary(teacher: nnx.Module, student: nnx.Module) -> None:
    """Raises ValueError when the models' token ids cannot mean the same: their vocabularies have different sizes."""
    sizes = [model.embeddings.token.embedding.get_value().shape[0] for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"teacher: its vocabulary has {sizes[0]} entries, the student's {sizes[1]}; both must read one tokenizer"
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that a recipe trained, and the records of its training (``FitResult.history``)."""

    model: nnx.Module
    history: list[dict[str, Any]]


def distil_logits(
    teacher: nnx.Module,
    student: nnx.Module,
    data: Iterable,
    config: TrainConfig,
    *,
    key: jax.Array,
    eval_data: Iterable | None = None,
    directory: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **loss: Any,
) -> Trained:
    """Train ``student`` on the distributions over tokens of ``teacher``, of any architecture with the same vocabulary.

    ``data``: batches of input_ids and, where there is padding, attention_mask (B, L); see `jaxformers.data.batches`.
    ``loss``: the arguments of `distil_objective`. ``config``: its path patterns (``trainable``, such as
    ``("layers.*.attention.**",)``), scan_layers and remat are the student's. ``directory``: as for `fit`; a run found
    there is taken up again.

    Returns the student, trained; both models given stay untouched. Raises ValueError as `distil_objective` and `fit`.
    """
    objective, params, freeze = distil_objective(
        teacher, student, scan_layers=config.scan_layers, remat=config.remat, mesh=mesh, **loss
    )
    result = fit(
        objective, params, data, within(config, "student", freeze), key=key, eval_data=eval_data, directory=directory,
        mesh=mesh,
    )  # fmt: skip
    return Trained(with_params(student, result.params["student"]), result.history)


def within(config: TrainConfig, part: str, freeze: paths.Patterns) -> TrainConfig:
    """``config`` for a tree of several models: its path patterns are those of the model ``part``, ``freeze`` the
    tree's own. What concerns the building of the model (scan_layers, remat) has been done by then."""
    inside = lambda patterns: tuple(f"{part}.{pattern}" for pattern in patterns)
    return dataclasses.replace(
        config,
        trainable=None if config.trainable is None else inside(config.trainable),
        freeze=(*paths.as_tuple(freeze), *inside(config.freeze)),
        scan_layers=False,
        remat=None,
    )
