"""The calibration pass: the blocks of a model one after another, each with the inputs that real data bring it.

The calibration sequences run through the embeddings once. Then :func:`through_blocks` hands each block and its inputs
to a function that measures and changes it; the changed block's outputs are the next block's inputs. One block is on the
device at a time, and of the model's own forward passes each block's is run once to measure and once to go on.

What a function may measure: Gram matrices of the inputs of each linear (GPTQ, SparseGPT), the norms of their columns
(Wanda), by :func:`collect`; or the outputs of blocks as they are, by :func:`run_blocks` (FuseGPT).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import sites, surgery, weights

# (input (B, L, D), what else the blocks are given, attention mask (B, L) or None): one step of calibration, on the host
Batch = tuple[np.ndarray, Any, np.ndarray | None]
# (statistic, samples seen, inputs (B, …, in), mask of their shape without the last axis or None) -> (statistic, seen)
Accumulate = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, Any]]


def checked_calibration(model: nnx.Module, calibration: Any) -> dict[str, np.ndarray]:
    """Calibration data as a batch: token ids (samples, length), or a mapping of the model's inputs by name.

    Raises ValueError for ids that are no integers or lie outside the vocabulary, arrays of different length, and a
    model without a stack of blocks called ``layers``.
    """
    if not hasattr(model, "layers"):
        raise ValueError(f"model: {type(model).__name__} has no stack of blocks called layers")
    batch = dict(calibration) if isinstance(calibration, Mapping) else {"input_ids": calibration}
    batch = {name: np.asarray(array) for name, array in batch.items()}
    ids = batch.get("input_ids")
    main = "input_ids" if ids is not None or not batch else next(iter(batch))
    if main == "input_ids" and (ids is None or ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu"):
        found = "nothing" if ids is None else f"{ids.dtype} {ids.shape}"
        raise ValueError(f"calibration: expected integer token ids (samples, length), got {found}")
    for name, array in batch.items():
        if array.ndim == 0 or len(array) != len(batch[main]):
            raise ValueError(
                f"calibration: {name} has {len(np.atleast_1d(array))} samples, {main} has {len(batch[main])}"
            )
    if ids is not None:
        rows = model.embeddings.token.embedding.get_value().shape[0]
        if ids.min() < 0 or ids.max() >= rows:
            raise ValueError(
                f"calibration: token ids from {ids.min()} to {ids.max()}, but the model's vocabulary has {rows}; "
                "was it made with another tokenizer?"
            )
    return {name: array.astype(np.int32) if array.dtype.kind in "iu" else array for name, array in batch.items()}


# ---- running parts of a model --------------------------------------------------------------------------------------


def first_inputs(model: nnx.Module, calibration: Mapping[str, np.ndarray], batch_size: int) -> list[Batch]:
    """The inputs of block 0, ``batch_size`` sequences an entry: the embeddings are run, the blocks and the head not.

    Raises ValueError where the blocks are given what is no array (the grid of an image model's patches).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be positive")
    embed, items = embedder(model), []
    for start in range(0, len(next(iter(calibration.values()))), batch_size):
        batch = {name: array[start : start + batch_size] for name, array in calibration.items()}
        x, context = embed(batch)
        items.append((np.asarray(x), jax.tree.map(np.asarray, context), batch.get("attention_mask")))
    return items


def embedder(model: nnx.Module) -> Callable[[Mapping[str, jax.Array]], tuple[jax.Array, dict[str, Any]]]:
    """``embed(batch) -> (x, context)``: what block 0 of ``model`` is given. Compiled once per shape."""
    model = surgery.copy(model)
    model.layers = nnx.data(_Recorder())
    return functools.partial(_embed, *nnx.split(model))


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: Any, state: Any, batch: Mapping[str, jax.Array]) -> Any:
    model = nnx.merge(graph, state)
    model(**batch)
    x, context = model.layers.seen[0]
    for name, value in context.items():  # traced, whole numbers would no longer be numbers in the block
        if isinstance(value, tuple) and value and all(isinstance(n, int) for n in value):
            raise ValueError(f"model: the blocks of {type(model).__name__} are given {name}={value}, no array")
    return x, context


class _Recorder(nnx.Module):
    """Stands for the blocks of a model: notes what they would be given, and puts out ``output`` in their place."""

    def __init__(self, output: jax.Array | None = None):
        self.path, self.seen, self.output = "", nnx.static(None), nnx.static(output)

    def __call__(self, x: jax.Array, *, cache: Any = None, key: Any = None, **context: Any) -> tuple[jax.Array, None]:
        self.seen = nnx.static([(x, context)])
        return x if self.output is None else self.output, None


def _output(graph: Any, state: Any, x: jax.Array, context: dict[str, Any]) -> jax.Array:
    return nnx.merge(graph, state)(x, **context)[0]


forward = jax.jit(_output, static_argnums=0)  # (graph, state) of a block, its input and context -> its output


def on_device(block: nnx.Module) -> nnx.Module:
    """A copy of a block on the device, its paths counted from itself: equal blocks share their compiled code."""
    graph, state = nnx.split(surgery.named(nnx.clone(block)))
    return surgery.named(nnx.merge(graph, jax.tree.map(jnp.asarray, state)))


def block_outputs(block: nnx.Module, batches: list[Batch]) -> list[Batch]:
    """``batches`` with the block's outputs (on the host) in the place of its inputs."""
    graph, state = nnx.split(block)
    return [(np.asarray(forward(graph, state, x, context)), context, mask) for x, context, mask in batches]


def run_blocks(model: nnx.Module, batches: list[Batch], start: int = 0, stop: int | None = None) -> list[Batch]:
    """Run blocks ``start`` … ``stop - 1`` of ``model`` (default: from the first to the last) on their inputs.

    ``batches``: inputs of block ``start``, from :func:`first_inputs` or an earlier call. Returns the same list with the
    inputs of block ``stop``, or what the final norm is given. One block is on the device at a time.

    Raises ValueError when ``start`` and ``stop`` name no run of blocks.
    """
    depth = len(model.layers)
    stop = depth if stop is None else stop
    if not 0 <= start <= stop <= depth:
        raise ValueError(f"start={start}, stop={stop}: expected 0 <= start <= stop <= {depth}, the number of blocks")
    for i in range(start, stop):
        batches = block_outputs(on_device(model.layers[i]), batches)
    return batches


def after_blocks(model: nnx.Module) -> Callable[[jax.Array, Mapping[str, Any]], Any]:
    """``finish(x, batch) -> Output``: the rest of ``model``, given the last block's output x (B, L, D) and the inputs
    that it came from (the embeddings are computed from them and thrown away). Compiled once per shape."""
    graph, state = nnx.split(surgery.copy(model))

    @jax.jit
    def finish(state: Any, x: jax.Array, batch: Mapping[str, Any]) -> Any:
        model = nnx.merge(graph, state)
        model.layers = nnx.data(_Recorder(x))
        return model(**batch)

    return lambda x, batch: finish(state, x, batch)


# ---- measuring and changing one block after another ----------------------------------------------------------------


def through_blocks(
    model: nnx.Module,
    batches: list[Batch] | None,
    change: Callable[[int, nnx.Module, list[Batch] | None], Mapping[str, Any]],
) -> nnx.Module:
    """A copy of ``model`` whose blocks have gone through ``change`` in order; ``model`` may hold views of a file.

    ``change(i, block, batches)`` gets block i on the device (paths counted from itself) with its inputs, changes it in
    place, and returns ``{path within the block: kernel}`` for the new model, which may be views of a file too. The
    outputs of the changed block are the next one's inputs. ``batches`` None: there are no data, nothing is run.
    """
    new = surgery.copy(model)
    for i in range(len(new.layers)):
        target = new.layers[i]
        block = on_device(target)
        kernels = change(i, block, batches)
        places = linears_of(target)
        for name, kernel in kernels.items():
            places[name].kernel.set_value(kernel)
        if batches is not None and i + 1 < len(new.layers):
            batches = block_outputs(block, batches)
    return surgery.named(new)


def linears_of(block: nnx.Module) -> dict[str, Any]:
    """{path within the block: module} of everything with a two-dimensional kernel."""
    found = surgery.find_linears(block, "**")
    return {path: module for path, module in found if len(module.kernel.get_value().shape) == 2}


def unwrap(kernel: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """(plain kernel, mask or None, how to put another one in its place): a mask is absorbed, LoRA stays on top.

    Raises ValueError for a kernel that is no plain array below those.
    """
    if isinstance(kernel, weights.LowRank):
        base, mask, rebuild = unwrap(kernel.base)
        return base, mask, lambda new: weights.LowRank(rebuild(new), kernel.a, kernel.b, kernel.scale)
    if isinstance(kernel, weights.Masked) and not weights.is_typed(kernel.base):
        return kernel.base, kernel.mask, lambda new: new
    if weights.is_typed(kernel):
        raise ValueError(f"already quantised: its weights are {type(kernel).__name__}")
    return kernel, None, lambda new: new


def shared_inputs(block: nnx.Module, x: Any, context: Any, names: list[str]) -> list[tuple[str, ...]]:
    """The linears ``names`` grouped by the input they share, in the order in which data reach them."""
    graph, state = nnx.split(block)
    leaves, tree = jax.tree.flatten((state, x, context))
    return list(_shared_inputs(graph, tree, tuple((np.shape(a), jnp.result_type(a)) for a in leaves), tuple(names)))


@functools.lru_cache(maxsize=64)  # equal blocks are traced once
def _shared_inputs(graph: Any, tree: Any, leaves: tuple, names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}

    def trace(state: Any, x: jax.Array, context: Any) -> None:
        _, seen = sites.reap(lambda: _output(graph, state, x, context), "**.input")()
        held = list(seen.values())  # alive, so that an id stays its own
        for site, value in seen.items():
            if site.removesuffix(".input") in names:
                groups.setdefault(id(value), []).append(site.removesuffix(".input"))
        del held

    jax.eval_shape(trace, *tree.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves]))
    return tuple(tuple(group) for group in groups.values())


def collect(
    block: nnx.Module, batches: list[Batch], groups: list[tuple[str, ...]], accumulate: Accumulate, ndim: int
) -> tuple[jax.Array, ...]:
    """One statistic per group of linears that share an input (:func:`shared_inputs`), over all ``batches``.

    ``accumulate``: :func:`jaxformers.compress.hessian.accumulate` (``ndim`` 2: (in, in)) or ``accumulate_norms``
    (``ndim`` 1: (in,)); float32, beginning with zeros. Tokens that the attention mask calls padding do not count.
    """
    graph, state = nnx.split(block)
    linears = linears_of(block)
    names = tuple(group[0] for group in groups)
    sizes = [linears[name].kernel.get_value().shape[0] for name in names]
    found, seen = tuple(jnp.zeros((n,) * ndim, jnp.float32) for n in sizes), 0
    for x, context, mask in batches:
        found = _add(graph, names, accumulate, state, x, context, mask, found, jnp.float32(seen))
        seen += len(x)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=7)
def _add(graph: Any, names: Any, accumulate: Accumulate, state: Any, x: Any, context: Any, mask: Any, found: Any, seen):
    """Add one batch to the statistics of the linears ``names``."""
    _, inputs = sites.reap(lambda: _output(graph, state, x, context), [f"{name}.input" for name in names])()
    out = []
    for name, statistic in zip(names, found, strict=True):
        value = inputs[f"{name}.input"]
        own = mask if mask is not None and value.shape[:2] == mask.shape else None
        out.append(accumulate(statistic, seen, value, own)[0])
    return tuple(out)
