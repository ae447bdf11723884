"""TransKD's recipe: a trained segmentation model and labelled images in, a small SegFormer's checkpoint out.

The loss is that of `jaxformers.compress.transkd`. A student that is only a Config begins at random, as in the paper,
with convolutions drawn as the authors' backbone draws them, N(0, 2 / fan_out).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import atomic, hub, paths, surgery
from jaxformers.compress.transkd import Distiller, TransKDConfig, check_models, new_distiller, transkd_objective
from jaxformers.data.segmentation import Segmentation, class_weights, resize_labels, segmentation_batches
from jaxformers.functional import functional, with_params
from jaxformers.metrics import intersection_over_union
from jaxformers.models import segformer
from jaxformers.nn.keys import Keys
from jaxformers.safetensors_io import CheckpointError, open_checkpoint, read_json, write_checkpoint
from jaxformers.train.loop import TrainConfig, fit
from jaxformers.train.optim import OptimConfig

# 1000 epochs of Cityscapes' 2975 images, two a batch; the authors' rate falls towards 0 at 1500 and is stopped there
PAPER = TrainConfig(
    steps=1_487_000,
    optim=OptimConfig(learning_rate=6e-5, final=1 / 3, weight_decay=0.01, no_decay=(), clip_norm=None),
)


@dataclasses.dataclass(frozen=True)
class Distilled:
    """`student` and what distilled it, `distiller` (None where the variant has none); `report` on the held-out data,
    see `evaluate`, or None; the records of training."""

    student: nnx.Module
    distiller: Distiller | None
    report: dict[str, Any] | None
    history: list[dict[str, Any]]


def segmentation_distil(
    teacher: str | Path | nnx.Module | None,
    student: str | Path | nnx.Module | segformer.Config,
    data: Segmentation,
    out: str | Path | None = None,
    *,
    key: jax.Array,
    config: TransKDConfig = TransKDConfig(),
    train: TrainConfig = PAPER,
    batch_size: int = 2,
    weights: Any = None,
    heldout: Segmentation | None = None,
    distiller: str | Path | Distiller | None = None,
    keep_distiller: str | Path | None = None,
    directory: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Distilled:
    """Teach `student` to segment `data` as `teacher` does; write it to `out` in Hugging Face's SegFormer format.

    Args:
        teacher: a checkpoint directory, a hub id, or a model; left untouched. None for the variant "none".
        student: likewise, or a Config, which begins at random and has `data.classes` labels.
        data: images and masks, see `jaxformers.data.segmentation`.
        weights: (classes,) weights of the cross-entropy; None takes `class_weights(data)`.
        heldout: measured at the end, and after every `train.eval_every` steps (`eval_miou`).
        distiller: what an earlier run kept (`keep_distiller`, a directory), to go on with; None begins anew.
        directory: where metrics and checkpoints go; a run found there is taken up again.
        mesh: images are spread over its axes data and fsdp; batch norms see the whole batch.

    Raises ValueError before any compute: models that do not fit together (`transkd.check_models`), labels other than
    the student's classes, a `distiller` of other sizes; see `Segmentation` for labels out of range.
    """
    student_key, distiller_key, train_key = jax.random.split(key, 3)
    if isinstance(teacher, str | Path):
        teacher = hub.load(teacher)
    if isinstance(student, segformer.Config):
        student = new_student(dataclasses.replace(student, num_labels=data.classes), key=student_key)
    elif not isinstance(student, nnx.Module):
        student = hub.load(student)
    if student.config.num_labels != data.classes:
        raise ValueError(f"student: it has {student.config.num_labels} labels, the data {data.classes} classes")
    check_models(teacher, student, config)
    if isinstance(distiller, str | Path):
        distiller = load_distiller(distiller)
    if distiller is None and config.variant not in ("none", "logits"):
        distiller = new_distiller(teacher, student, config, key=distiller_key)
    elif distiller is not None:
        _check_distiller(distiller, new_distiller(teacher, student, config, key=distiller_key))

    weights = class_weights(data) if weights is None else weights
    options = {"scan_layers": train.scan_layers, "remat": train.remat}
    objective, params, freeze = transkd_objective(
        teacher, student, distiller, config, class_weights=weights, void=data.void, **options
    )
    freeze += _unused(params.get("distiller", {}), batch_size // train.accumulate)
    run = dataclasses.replace(train, freeze=(*train.freeze, *freeze), scan_layers=False, remat=None)
    measure = None
    if heldout is not None and train.eval_every:
        apply = functional(student, **options)[0]
        measure = lambda params, step: {"eval_miou": evaluate((apply, params["student"]), heldout)["miou"]}
    batches = segmentation_batches(data, batch_size)
    result = fit(objective, params, batches, run, key=train_key, evaluate=measure, directory=directory, mesh=mesh)
    student = with_params(student, result.params["student"])
    if distiller is not None:
        distiller = with_params(distiller, result.params["distiller"])
    if out is not None:
        hub.save(student, out)
    if keep_distiller is not None and distiller is not None:
        save_distiller(distiller, keep_distiller)
    report = None if heldout is None else evaluate(student, heldout)
    return Distilled(student, distiller, report, result.history)


def new_student(config: segformer.Config, *, key: jax.Array) -> nnx.Module:
    """A SegFormer with the segmentation head at random, convolutions from N(0, 2 / fan_out)."""
    model = hub.init(config, head="semantic_segmentation", key=key)

    def scaled(path: str, x: jax.Array) -> jax.Array:
        if not path.endswith("kernel") or x.ndim != 4:
            return x
        rows, columns, inside, outside = x.shape  # inside: per group, of which there is one, or as many as channels
        fan_out = rows * columns * (1 if inside == 1 else outside)
        return x * ((2 / fan_out) ** 0.5 / config.initializer_range)

    flat = paths.flatten(functional(model)[1])
    return with_params(model, paths.unflatten({path: scaled(path, x) for path, x in flat.items()}))


def evaluate(model: Any, data: Segmentation, *, batch_size: int = 8) -> dict[str, Any]:
    """`jaxformers.metrics.intersection_over_union` of the model (or ``(apply, params)``) on `data`, at the logits'
    size, a quarter of the images', as the authors measure. Counted batch by batch; void pixels do not count."""
    apply, params = functional(model) if isinstance(model, nnx.Module) else model
    void_class = data.void if data.void is not None and data.void < data.classes else None

    @jax.jit
    def counts(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        logits = apply(params, {"pixel_values": batch["pixel_values"]}).logits
        labels = resize_labels(batch["labels"], logits.shape[2:])
        kept = jnp.ones(labels.shape, bool) if data.void is None else labels != data.void
        cell = jnp.where(kept, labels * data.classes + jnp.argmax(logits, axis=1), data.classes**2)
        return jnp.bincount(cell.ravel(), length=data.classes**2 + 1)[:-1]

    total = np.zeros(data.classes**2, np.int64)
    once = {"shuffle": False, "epochs": 1, "drop_remainder": False}
    for batch in segmentation_batches(data, batch_size, shared=False, **once):
        total += np.asarray(counts(params, batch), np.int64)
    return intersection_over_union(total.reshape(data.classes, data.classes), void=void_class)


def save_distiller(distiller: Distiller, directory: str | Path) -> None:
    """Write a distiller to go on with: `distiller.json` says what it is, `model.safetensors` has its weights."""
    tensors = [(path, np.asarray(x)) for path, x in paths.flatten(functional(distiller)[1]).items()]
    write_checkpoint(tensors, directory, extra_files={"distiller.json": atomic.json_bytes(distiller.sizes())})


def load_distiller(directory: str | Path) -> Distiller:
    """What `save_distiller` wrote. Raises CheckpointError for a directory that is none, or tensors that do not fit."""
    settings = read_json(Path(directory) / "distiller.json")
    try:
        config = settings.pop("config")
        config = TransKDConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        model = nnx.eval_shape(lambda: Distiller(config=config, **sizes, rngs=Keys(0)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{directory}: distiller.json does not describe a distiller ({error})") from error
    found = {name: jnp.asarray(tensor.read()) for name, tensor in open_checkpoint(directory, check_finite=True).items()}
    like = paths.flatten(nnx.to_pure_dict(nnx.state(model)))
    for name in sorted(like.keys() | found.keys()):
        if name not in found or name not in like or found[name].shape != like[name].shape:
            raise CheckpointError(f"{directory}: the tensor {name} does not fit what distiller.json describes")
    nnx.replace_by_pure_dict(state := nnx.state(model), paths.unflatten(found))
    nnx.update(model, state)
    return surgery.named(model)


def _check_distiller(given: Distiller, expected: Distiller) -> None:
    if given.sizes() != expected.sizes():
        raise ValueError(f"distiller: it was made for {given.sizes()}, these models need {expected.sizes()}")


def _unused(params: dict[str, Any], images: int) -> tuple[str, ...]:
    """Patterns of the branch that no batch of so many images goes through: weight decay is to leave it alone too."""
    branch = "squeeze_single" if images > 1 else "{squeeze,squeeze_norm}"
    there = any(".squeeze." in path for path in paths.flatten(params))
    return (f"distiller.fusion.stages.*.{branch}.**",) if there else ()
