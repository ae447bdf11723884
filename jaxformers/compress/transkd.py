"""TransKD: a small hierarchical vision transformer learns segmentation from a large one's maps and patch embeddings.

"TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation" (arXiv 2202.13393). Per stage s, E_s
is the embedding of its patches behind their norm (the site `stages.s.embeddings`) and F_s its map behind the last norm
(`stages.s.output`); T marks the teacher's. The student's are carried to the teacher's widths by
:class:`jaxformers.nn.FeatureFusion` (CSF, O_s) and :class:`jaxformers.nn.EmbeddingAlignment` (PEA, Ê_s):

    L = CE_w(Z, y) + map_weight sum_s hcl(O_s, F_s^T) + sum_s w_s MSE(Ê_s, E_s^T)

Z are the student's logits, y labels at their size, CE_w the cross-entropy weighed by class. The variants: "base"; "gl"
mixes E_4 globally and locally first; "ea" adds patches of the teacher's width to Ê_s. And to compare with: "none"
(CE_w alone), "logits" (Hinton), "review" (ReviewKD: attention fuses, no embeddings) and "cwd" (channel-wise, deepest
stage). What distils is dropped afterwards: the student's logits do not depend on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import image_losses, losses, nn, surgery
from jaxformers.data.segmentation import augment, resize_labels
from jaxformers.functional import functional
from jaxformers.nn.keys import Keys
from jaxformers.sites import reap

TRANSKD = ("base", "gl", "ea")
VARIANTS = (*TRANSKD, "none", "logits", "review", "cwd")
MAP_LOSSES = ("hcl", "cwd", "kl")
STATISTICS = "**.{mean,var}"


@dataclasses.dataclass(frozen=True)
class TransKDConfig:
    """What the student imitates; see the module's first paragraph for `variant`.

    `map_loss`: of fused maps, "hcl", "cwd" or "kl", the last two at `temperature`, as "cwd" and "logits" have theirs.
    `map_weight`: of everything but CE and embeddings. `embedding_weights`: w_s, shallow to deep; 0 leaves a stage out,
    () all of them. `width`: channels in which maps are fused. `mixer_heads`, `mixer_add`: of "gl". `flip`, `shift`: how
    images are augmented, see `data.segmentation.augment`.

    Raises ValueError for a value that cannot be, or that the variant has no use for.
    """

    variant: str = "base"
    map_loss: str = "hcl"
    temperature: float = 1.0
    map_weight: float = 1.0
    embedding_weights: tuple[float, ...] | None = None
    width: int = 64
    mixer_heads: int = 8
    mixer_add: bool = False
    flip: float = 0.5
    shift: int = 2

    def __post_init__(self):
        for field, allowed in (("variant", VARIANTS), ("map_loss", MAP_LOSSES)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: expected one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        fuses = self.variant in (*TRANSKD, "review")
        tempered = self.variant in ("logits", "cwd") or (fuses and self.map_loss != "hcl")
        uses = {
            "map_loss": fuses, "width": fuses, "temperature": tempered, "map_weight": self.variant != "none",
            "embedding_weights": self.variant in TRANSKD, "mixer_heads": self.variant == "gl",
            "mixer_add": self.variant == "gl",
        }  # fmt: skip
        for field in dataclasses.fields(self):
            if not uses.get(field.name, True) and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name}: the variant {self.variant!r} with its losses has no use for it")
        weights = (self.map_weight, *(self.embedding_weights or ()))
        if not all(math.isfinite(w) and w >= 0 for w in weights):
            raise ValueError(f"map_weight, embedding_weights: expected numbers of 0 or more, got {weights}")
        if not self.temperature > 0 or self.width < 1 or self.mixer_heads < 1:
            raise ValueError("temperature, width, mixer_heads: expected more than 0")
        if not 0 <= self.flip <= 1 or self.shift < 0:
            raise ValueError(f"flip, shift: expected a probability and pixels, got {self.flip} and {self.shift}")

    def weights_of(self, stages: int) -> tuple[float, ...]:
        """w_s of `stages` stages; the paper's (0.1, 0.1, 0.5, 1) by default, and none for a variant without."""
        if self.variant not in TRANSKD or self.embedding_weights == ():
            return (0.0,) * stages
        weights = (0.1, 0.1, 0.5, 1.0) if self.embedding_weights is None else self.embedding_weights
        if len(weights) != stages:
            raise ValueError(f"embedding_weights: expected one for each of {stages} stages, got {weights}")
        return weights


class Distiller(nnx.Module):
    """What carries a student's stages to its teacher's widths while it learns; None where the variant has no part.

    `channels`, `large`: of both networks' stages, shallow to deep.
    """

    def __init__(
        self, channels: tuple[int, ...], large: tuple[int, ...], config: TransKDConfig, *, image_channels: int = 3,
        rngs: Any,
    ):  # fmt: skip
        nn.alignment.same_stages(channels, large)
        self.path = ""
        self.channels, self.large, self.config, self.image_channels = channels, large, config, image_channels
        self.fusion = self.align = self.project = nnx.data(None)
        if config.variant in (*TRANSKD, "review"):
            kind = "attention" if config.variant == "review" else "selection"
            self.fusion = nn.FeatureFusion(channels, large, kind, width=config.width, rngs=rngs)
        if any(config.weights_of(len(channels))):
            heads = config.mixer_heads if config.variant == "gl" else None
            self.align = nn.EmbeddingAlignment(
                channels, large, mixer_heads=heads, add=config.mixer_add, assistant=config.variant == "ea",
                image_channels=image_channels, rngs=rngs,
            )  # fmt: skip
        if config.variant == "cwd":
            self.project = nn.Conv(channels[-1], large[-1], (1, 1), std=channels[-1] ** -0.5, rngs=rngs)

    def sizes(self) -> dict[str, Any]:
        """The arguments that this was made with."""
        config = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(TransKDConfig)}
        return {"channels": self.channels, "large": self.large, "image_channels": self.image_channels, "config": config}

    def __call__(
        self,
        maps: list[Float[Array, "batch rows columns channels"]],
        embeddings: list[Float[Array, "batch length channels"]],
        pixel_values: Float[Array, "batch image_channels height width"],
        *,
        rngs: jax.Array | None = None,
    ) -> tuple[list[Array], list[Array]]:
        """(maps, embeddings) at the teacher's widths; `rngs` (training) has batch norms use the batch's statistics."""
        aligned = [] if self.align is None else self.align(embeddings, maps, pixel_values)
        if self.project is not None:
            return [self.project(maps[-1])], aligned
        fused = [] if self.fusion is None else self.fusion(maps, batch_statistics=rngs is not None)
        return fused, aligned


def new_distiller(teacher: nnx.Module, student: nnx.Module, config: TransKDConfig, *, key: jax.Array) -> Distiller:
    """The :class:`Distiller` for two models, its weights drawn from `key`. Raises ValueError as `check_models`."""
    check_models(teacher, student, config)
    sizes = (student.config.hidden_sizes, teacher.config.hidden_sizes)
    build = lambda key: Distiller(*sizes, config, image_channels=student.config.num_channels, rngs=Keys(key))
    model = nnx.eval_shape(lambda: build(0))
    nnx.update(model, jax.jit(lambda key: nnx.state(build(key)))(key))
    return surgery.named(model)


def check_models(teacher: nnx.Module | None, student: nnx.Module, config: TransKDConfig) -> None:
    """Raise ValueError where the two models, or their heads, do not fit together."""
    for name, model in (("student", student), ("teacher", teacher)):
        if name == "teacher" and config.variant == "none":
            return
        if model is None or not hasattr(model, "stages") or not hasattr(model.config, "strides"):
            raise ValueError(f"{name}: expected a model of stages such as SegFormer, got {type(model).__name__}")
        if getattr(model, "head_name", None) != "semantic_segmentation" and (
            name == "student" or config.variant == "logits"
        ):
            raise ValueError(f"{name}: it needs the head semantic_segmentation, and has {model.head_name!r}")
    strides = student.config.strides, teacher.config.strides
    if len(strides[0]) != len(strides[1]):
        raise ValueError(f"teacher: it has {len(strides[1])} stages, the student {len(strides[0])}")
    if strides[0] != strides[1]:
        raise ValueError(f"teacher: its strides {strides[1]} are not the student's {strides[0]}: maps differ in size")
    if student.config.num_channels != teacher.config.num_channels:
        raise ValueError("teacher: it takes images with another number of channels than the student")
    if config.variant == "logits" and student.config.num_labels != teacher.config.num_labels:
        raise ValueError(f"teacher: {teacher.config.num_labels} classes, the student has {student.config.num_labels}")
    config.weights_of(len(strides[0]))


def transkd_objective(
    teacher: nnx.Module | None,
    student: nnx.Module,
    distiller: Distiller | None,
    config: TransKDConfig = TransKDConfig(),
    *,
    class_weights: Any = None,
    void: int | None = None,
    **options: Any,
) -> tuple[Callable, dict[str, Any], tuple[str, ...]]:
    """What `jaxformers.train.fit` needs to teach `student`: (objective, params, freeze).

    `params` is {"student", and "teacher" and "distiller" where the variant has them}; `freeze` names the teacher, which
    runs without dropout and without gradient. Batches hold pixel_values (B, C, H, W) and labels (B, H, W); labels are
    compared at the logits' size, a quarter. `class_weights` (classes,) or None for equal ones. `void`: a label that
    does not count; pixels shifted in get it. Batch norms follow their running statistics through `metrics["running"]`.
    Metrics: "ce", "maps", "embeddings", unweighted but for w_s. `options` (scan_layers, remat) go to
    `jaxformers.functional` for the student.

    Raises ValueError where models do not fit together (`check_models`), for class weights of another number, and, in
    the forward pass, for maps that differ in size.
    """
    check_models(teacher, student, config)
    weights = None if class_weights is None else np.asarray(class_weights, np.float32)
    classes = student.config.num_labels
    if weights is not None and weights.shape != (classes,):
        raise ValueError(f"class_weights: expected one for each of {classes} classes, got {weights.shape}")
    if void is None and config.shift:
        raise ValueError("void: shifted images need a label for what comes in; give void, or a config with shift=0")
    alone, needs_teacher = config.variant in ("none", "logits"), config.variant != "none"
    if (distiller is None) != alone:
        raise ValueError(f"distiller: the variant {config.variant!r} has {'none' if alone else 'one: new_distiller'}")

    stages = len(student.config.strides)
    student_apply, params = functional(student, **options)
    params = {"student": params}
    norms = {"student": _statistics(student)}
    apply_distiller = apply_teacher = None
    if needs_teacher:
        apply_teacher, params["teacher"] = functional(teacher)
        apply_teacher = reap(apply_teacher, _sites(stages))
    if distiller is not None:
        apply_distiller, params["distiller"] = functional(distiller)
        norms["distiller"] = _statistics(distiller)
        # a pattern, not names: with one image a batch some norms are passed by
        apply_distiller = reap(apply_distiller, STATISTICS if norms["distiller"] else ())
    apply_student = reap(student_apply, (*_sites(stages), *norms["student"]))

    def objective(apply: Any, params: dict[str, Any], batch: dict[str, Array], key: Array | None):
        pixels, labels = batch["pixel_values"], batch["labels"].astype(jnp.int32)
        student_key, augment_key = nn.split(key, 2)
        if key is not None:
            border = 0 if void is None else void
            pixels, labels = augment(pixels, labels, augment_key, flip=config.flip, shift=config.shift, void=border)
        inputs = {"pixel_values": pixels}
        out, seen = apply_student(params["student"], inputs, rngs=student_key)
        logits = jnp.moveaxis(out.logits, 1, -1)
        ce = segmentation_loss(logits, labels, weights, void)
        running = {f"student.{name}": seen[name] for name in norms["student"]}
        zero = jnp.zeros((), jnp.float32)
        terms = {"ce": ce, "maps": zero, "embeddings": zero}
        if needs_teacher:
            large, shown = apply_teacher(jax.lax.stop_gradient(params["teacher"]), inputs)
            goals = [shown[f"stages.{i}.output"] for i in range(stages)]
            _same_grids(goals, [seen[f"stages.{i}.output"] for i in range(stages)])
            if config.variant == "logits":
                goal = jnp.moveaxis(large.logits, 1, -1)
                terms["maps"] = image_losses.cell_wise(logits, goal, temperature=config.temperature)
        if distiller is not None:
            parts = {name: [seen[f"stages.{i}.{site}"] for i in range(stages)]
                     for name, site in (("maps", "output"), ("embeddings", "embeddings"))}  # fmt: skip
            (maps, embeddings), used = apply_distiller(params["distiller"], {**parts, **inputs}, rngs=student_key)
            running |= {f"distiller.{name}": value for name, value in used.items()}
            shown = [shown[f"stages.{i}.embeddings"] for i in range(stages)]
            terms |= imitation(config, maps, embeddings, goals, shown)
        loss = ce + config.map_weight * terms["maps"] + terms["embeddings"]
        return loss, {**terms, "running": running} if key is not None else terms

    return objective, params, ("teacher.**",) if needs_teacher else ()


def segmentation_loss(
    logits: Float[Array, "batch rows columns classes"],
    labels: Int[Array, "batch height width"],
    class_weights: Any = None,
    void: int | None = None,
) -> Float[Array, ""]:
    """CE_w: labels resized to the logits, Σ w_y nll / Σ w_y over pixels that are not `void`, whose logit, if it has
    one, takes part in the softmax."""
    labels = resize_labels(labels, logits.shape[1:3])
    ignored = losses.IGNORE if void is None else void
    return losses.cross_entropy(logits, labels, ignore_index=ignored, class_weights=class_weights)


def imitation(
    config: TransKDConfig,
    maps: list[Float[Array, "batch rows columns channels"]],
    embeddings: list[Float[Array, "batch length channels"]],
    teacher_maps: list[Float[Array, "batch rows columns channels"]],
    teacher_embeddings: list[Float[Array, "batch length channels"]],
) -> dict[str, Float[Array, ""]]:
    """{"maps": the sum over stages of the maps' loss, "embeddings": Σ w_s MSE}, of what a :class:`Distiller` returned.

    No gradient flows into the teacher. Fewer maps than stages are those of the deepest; no embeddings give 0. Raises
    ValueError for shapes that differ.
    """
    kind = "cwd" if config.variant == "cwd" else config.map_loss
    loss = {"cwd": image_losses.channel_wise, "kl": image_losses.cell_wise}.get(kind)
    of = lambda x, y: loss(x, y, temperature=config.temperature) if loss else image_losses.hierarchical_context(x, y)
    pairs = zip(maps, teacher_maps[-len(maps) :] if maps else (), strict=True)
    terms = {"maps": sum((of(x, y) for x, y in pairs), jnp.float32(0)), "embeddings": jnp.float32(0)}
    if embeddings:
        weights = config.weights_of(len(embeddings))
        for weight, x, y in zip(weights, embeddings, teacher_embeddings, strict=True):
            if x.shape != y.shape:
                raise ValueError(f"teacher_embeddings: shape {y.shape} differs from the student's, {x.shape}")
            y = jax.lax.stop_gradient(y).astype(jnp.float32)
            terms["embeddings"] += weight * jnp.square(x.astype(jnp.float32) - y).mean()
    return terms


def _sites(stages: int) -> tuple[str, ...]:
    return tuple(f"stages.{i}.{name}" for i in range(stages) for name in ("embeddings", "output"))


def _statistics(model: nnx.Module) -> tuple[str, ...]:
    """Sites, and parameters, of the running statistics that a training batch moves."""
    norms = [".".join(map(str, path)) for path, m in nnx.iter_modules(model) if isinstance(m, nn.BatchNorm)]
    return tuple(f"{path}.{name}" for path in norms for name in ("mean", "var"))


def _same_grids(teacher: list[Array], student: list[Array]) -> None:
    for i, (x, y) in enumerate(zip(teacher, student, strict=True)):
        if x.shape[1:3] != y.shape[1:3]:
            raise ValueError(f"teacher: stage {i} has a map of {x.shape[1:3]} cells, the student one of {y.shape[1:3]}")
