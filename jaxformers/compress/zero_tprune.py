"""Zero-TPrune: fewer tokens from block to block of a vision transformer, chosen by its own attention, without training.

Source: "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers",
arXiv 2305.17328. After a block with attention A (H, N, N; rows are queries and sum to 1) and keys K (N, d), tokens are
nodes of a graph in which every token hands its importance on along its attention (weighted page rank):

    s_0 uniform, the class token √N times as much;   s_t = Aᵀ s_{t-1},  t = 1..T;   Σ_i s_i = 1 throughout
    η_h = 1 if v_min ≤ Var_h ≤ v_max else 0,  Var_h the variance of N s^h over the tokens          (head filter, VHF)
    s_i = sqrt( Σ_h η_h (s_i^h)² / Σ_h η_h )                                             (informative regions, EIR)

A pruning layer behind a block is I' → S → I: importance by one vote ranks the image tokens; of the less important half
those r are removed whose keys are most like a key of the more important half, m(a) = max_b cos(K_a, K_b); importance by
T votes on the graph of the survivors (rows of A made to sum to 1 again) keeps the share ρ of them. Class, distillation,
register and prompt tokens, all that stands before the patches, always stay, and kept tokens stay in order.

    apply, params = zero_tprune.pruner(jf.load("facebook/deit-small-patch16-224"))
    pruned = jax.jit(apply, static_argnames=("schedule", "options"))(params, images, schedule=zero_tprune.DEIT_S)

How many tokens go depends on the schedule alone, so shapes are static; which ones, on each image. Only the blocks with
a pruning layer behind them form their attention probabilities, and where a kernel gives Aᵀ s (:func:`column_sums` of
`kernels.attention`) not even those. `zero_tprune_search.py` counts multiply-adds and searches schedules.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxformers import hub, nn, surgery
from jaxformers.compress.zero_tprune_graph import Counts, Options, Stage, choose, kept_patches, observed

DEIT_S = (
    Stage(1, 10, 1.0, 30),
    Stage(3, 10, 0.9, 5),
    Stage(6, 10, 0.8, 5),
    Stage(9, 10, 0.7, 1),
    Stage(11, 10, 1.0, 1),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruned:
    """``output``: the model's. By block of a pruning layer: ``kept`` (B, N') positions in the sequence that entered the
    layer, ascending; ``scores`` (B, N') what the layer ranked them by last. ``tokens`` (B, N''): the positions in the
    whole sequence, special tokens first, of what reached the end."""

    output: nn.Output
    kept: dict[int, jax.Array]
    scores: dict[int, jax.Array]
    tokens: jax.Array


def pruner(model: nnx.Module) -> tuple[Callable[..., Pruned], dict[str, Any]]:
    """``(apply, params)`` like :func:`jaxformers.functional`, for a model that can be pruned.

    ``apply(params, batch, schedule=(), options=Options(), key=None) -> Pruned``: ``batch`` holds ``pixel_values``
    (B, C, H, W) of one size; ``schedule`` is a tuple of :class:`Stage`, or of tuples of their fields; ``key`` is for
    random choices. Schedule and options are static under jit.

    ViT, DeiT, DINOv2 and what else has a class token, patches and pre-norm blocks with plain attention between all
    tokens. Raises ValueError for other models (Swin's windows and BEiT's relative positions need whole grids), and when
    called: for a block out of range or repeated, r ≥ half of the image tokens, a keep rate outside (0, 1], other inputs
    than images, and a random choice without a key.
    """
    check_model(model)
    graph, state = nnx.split(surgery.copy(model))

    def apply(
        params: Any, batch: Mapping[str, Any], schedule: Iterable[Stage] = (), options: Options = Options(),
        key: jax.Array | None = None,
    ) -> Pruned:  # fmt: skip
        images = _images(batch)
        model = nnx.merge(graph, params)
        patches = patch_count(model, images.shape)
        plan = check_schedule(schedule, len(model.layers), patches, options, key)
        kept, scores = {}, {}
        left: dict[str, Any] = {}  # what is still there, as blocks run one after the other

        def run(i: int, block: nnx.Module, x: jax.Array) -> jax.Array:
            if i == 0:
                left["specials"] = special_tokens(model, x.shape[1], patches)
                left["tokens"] = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
            if i + 1 not in plan:
                return block(x)[0]
            specials, own = left["specials"], None if key is None else jax.random.fold_in(key, i)
            counts = Counts.of(plan[i + 1], x.shape[1] - specials)
            x, graph_seen = observed(block, x, options)
            keep, score = choose(graph_seen, specials, counts, options, own)
            index = jnp.argsort(~keep, axis=1, stable=True)[:, : specials + counts.keep]
            kept[i + 1], scores[i + 1] = index, jnp.take_along_axis(score, index, 1)
            left["tokens"] = jnp.take_along_axis(left["tokens"], index, 1)
            return jnp.take_along_axis(x, index[..., None], 1)

        model.layers = Stack(model.layers, run)
        output = model(pixel_values=images)
        return Pruned(output, kept, scores, left["tokens"])

    return apply, nnx.to_pure_dict(state)


def prune_tokens(
    model: nnx.Module | str | Path,
    images: Any,
    schedule: Iterable[Stage] = DEIT_S,
    options: Options = Options(),
    *,
    key: jax.Array | None = None,
) -> Pruned:
    """Run ``model``, or the checkpoint at that path, on ``images`` (B, C, H, W), pruned: :func:`pruner` for one call.

    Raises ValueError as there.
    """
    apply, params = pruner(model if isinstance(model, nnx.Module) else hub.load(model))
    run = jax.jit(apply, static_argnames=("schedule", "options"))
    return run(params, {"pixel_values": _images({"pixel_values": images})}, tuple(schedule), options, key)


# ---- around the blocks -----------------------------------------------------------------------------------------------


class Stack(nnx.Module):
    """Blocks that ``run(index, block, x)`` runs one after the other, in place of a model's `Layers`."""

    def __init__(self, layers: nn.Layers, run: Callable):
        self.layers, self.run = layers, run

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> tuple[jax.Array, None]:
        for i, block in enumerate(self.layers):
            x = self.run(i, block, x)
        return x, None


def check_model(model: nnx.Module) -> None:
    """Raise ValueError for a model whose tokens cannot be pruned."""
    what = f"model: {type(model).__name__}"
    embeddings, layers = getattr(model, "embeddings", None), getattr(model, "layers", None)
    tokens = isinstance(embeddings, nn.ImageEmbeddings) and embeddings.cls_token is not None
    if not tokens or not isinstance(layers, nn.Layers) or "pixel_values" not in reads(model):
        raise ValueError(
            f"{what} is no ViT with a class token and one stack of blocks; Zero-TPrune is for ViT, DeiT, DINOv2"
        )
    if model.head_name == "masked_image_modeling":
        raise ValueError(f"{what} predicts pixels of the whole grid; pruned tokens have none")
    for block in layers:
        attention = getattr(block, "attention", None)
        if type(attention) is not nn.Attention or attention.relative is not None or attention.reduce is not None:
            raise ValueError(
                f"{what}: {block.path}.attention needs the whole grid of patches; its tokens cannot be pruned"
            )
        if not block.prenorm or getattr(block.mlp, "spatial", False):
            raise ValueError(f"{what}: {block.path} is no pre-norm block of attention and MLP")


def reads(model: nnx.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(model).__call__).parameters)


def check_schedule(
    schedule: Iterable[Stage], depth: int, patches: int, options: Options, key: Any = None
) -> dict[int, Stage]:
    """The stages by block. Raises ValueError for what :func:`pruner` names."""
    plan: dict[int, Stage] = {}
    stages = [stage if isinstance(stage, Stage) else Stage(*stage) for stage in schedule]
    for stage in sorted(stages, key=lambda stage: stage.block):
        where = f"schedule: block {stage.block}"
        if not 1 <= stage.block <= depth or stage.block in plan:
            why = "is named twice" if stage.block in plan else f"is not among the model's, 1 to {depth}"
            raise ValueError(f"{where} {why}")
        if not 0 < stage.keep_rate <= 1 or stage.votes < 1:
            raise ValueError(f"{where}: expected 0 < keep_rate ≤ 1 and votes ≥ 1, got {stage.keep_rate}, {stage.votes}")
        by_similarity = patches - kept_patches(stage, patches) if options.method == "s_stage" else stage.remove
        if not 0 <= stage.remove or by_similarity >= max(patches // 2, 1):
            raise ValueError(
                f"{where}: of {patches} image tokens fewer than {patches // 2} can be removed by similarity, not "
                f"{by_similarity}"
            )
        plan[stage.block], patches = stage, kept_patches(stage, patches)
    if plan and key is None and (options.method == "random" or options.partition == "random"):
        raise ValueError("key: random choices need a PRNG key")
    return plan


def special_tokens(model: nnx.Module, length: int, patches: int) -> int:
    """How many tokens stand before the ``patches`` in a sequence of ``length``. Raises ValueError when that is none."""
    if length <= patches:
        raise ValueError(f"model: {type(model).__name__} runs {length} tokens of {patches} patches; some are masked")
    return length - patches


def patch_count(model: nnx.Module, shape: tuple[int, ...]) -> int:
    """How many patches ``model`` cuts an image of ``shape`` (…, H, W) into."""
    rows, columns, *_ = model.embeddings.patch.kernel.get_value().shape
    return (shape[-2] // rows) * (shape[-1] // columns)


def _images(batch: Mapping[str, Any]) -> jax.Array:
    for name in batch:
        if name != "pixel_values":
            raise ValueError(f"batch: {name!r} says that images are padded or masked; only whole images can be pruned")
    images = batch.get("pixel_values")
    if isinstance(images, list | tuple) and len({jnp.shape(image) for image in images}) > 1:
        raise ValueError("pixel_values: images of several sizes; a pruned batch needs one size, without padding")
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"pixel_values: expected (batch, channels, height, width), got {images.shape}")
    return images
