"""The training loop: one compiled step, and around it what lets a run be watched, stopped and taken up again.

An *objective* is a pure function ``objective(apply, params, batch, key) -> (loss, metrics)``: ``apply`` and ``params``
as `jaxformers.functional` gives them, ``key`` a PRNG key while training and None in evaluation (hand it on as
``rngs``), ``metrics`` a dict of scalars. A metric called ``weight`` (how many targets the loss is a mean over) makes
means over micro-batches and over evaluation batches exact; without it micro-batches count equally and evaluation
batches by their examples. A metric called ``running`` is a dict {path of a parameter: this batch's statistic}: those
parameters, the running statistics of batch norms, follow it with torch's momentum of 0.1 instead of being optimised
(micro-batches are averaged; over a mesh a batch's statistics are those of the whole batch). Whatever else an objective
needs, a teacher's weights for example, belongs into ``params`` under frozen paths: arrays that it closes over would be
compiled into the program as constants.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxformers.compilation import enable_cache
from jaxformers.distributed import Watch
from jaxformers.mesh import constrained
from jaxformers.mesh import mesh as make_mesh
from jaxformers.train import placement
from jaxformers.train.config import TrainConfig
from jaxformers.train.flops import peak_flops
from jaxformers.train.logs import Recorder, batch_size, local
from jaxformers.train.optim import OptimConfig, make_optimizer, schedule
from jaxformers.train.preempt import Sigterm
from jaxformers.train.state import Flat, State, leaf_paths, master, narrowed, split
from jaxformers.train.step import Compiled, make_eval, make_step
from jaxformers.train.stream import Stream, agreed, gather_states, own_state

Objective = Callable[[Any, Any, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is NaN or infinite: at ``step``, in ``batch`` (a file), after ``checkpoint``."""

    def __init__(self, message: str, step: int, batch: Path | None, checkpoint: Path | None):
        super().__init__(message)
        self.step, self.batch, self.checkpoint = step, batch, checkpoint


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run leaves: ``params`` in the tree that was given (trained leaves in float32), ``ema`` likewise or None,
    ``model`` with those parameters when `fit` was given one, the records of `metrics.jsonl` as ``history``, those
    from before an interruption included."""

    params: Any
    ema: Any
    model: nnx.Module | None
    step: int
    history: list[dict[str, Any]]

    def last(self, name: str) -> float:
        """The latest value of a metric, such as "loss" or "eval_loss". Raises KeyError when there is none."""
        for record in reversed(self.history):
            if name in record:
                return record[name]
        raise KeyError(name)


class _Pending(NamedTuple):
    """A step that was handed to the device and whose metrics nobody has looked at yet."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Any
    position: dict
    flops: float


def fit(
    objective: Objective,
    model_or_params: Any,
    data: Iterable,
    config: TrainConfig,
    *,
    key: jax.Array,
    apply: Callable | None = None,
    optimizer: optax.GradientTransformation | None = None,
    eval_data: Iterable | None = None,
    eval_objective: Objective | None = None,
    evaluate: Callable[[Any, int], Mapping[str, float]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Any = None,
    directory: str | Path | None = None,
) -> FitResult:
    """Train by ``objective`` for ``config.steps`` batches of ``data``.

    Args:
        objective: see the module's first paragraph.
        model_or_params: an nnx model, the pair ``(apply, params)`` of `jaxformers.functional`, or a parameter tree
            (then ``apply``, which may be None, is what the objective gets). What is given stays untouched.
        data: a grain dataset or iterator of batches (`jaxformers.data.batches`), or any iterable of them; begun anew
            when it ends. A batch is a dict of numpy arrays whose first axis counts this process's examples.
        key: PRNG key; step i uses ``fold_in(key, i)``. Dropout is a large part of a scanned step's compile time:
            ``jax.random.key(seed, impl="rbg")`` compiles nearly a fifth faster on CPUs, with other random numbers.
        optimizer: an optax transformation over ``{path: array}`` in place of ``config.optim``.
        eval_data: an iterable of batches, gone through whole at each evaluation; gives ``eval_loss``, ``eval_<metric>``
            by ``eval_objective`` (default: ``objective``).
        evaluate: ``evaluate(params, step) -> {name: number}``, any further measurement. The arrays are overwritten by
            the next step: copy what is to be kept.
        mesh: the batch is split over its axes data and fsdp. It defaults to the one that the parameters are on, else
            where several processes run (`jaxformers.distributed`) to all their devices along data; what `evaluate` and
            the caller get is then each process's own whole copy.
        shardings: a tree like the parameters that says where they go; without it they stay where they are on the mesh,
            else go by the table of `jaxformers.mesh`.
        directory: receives `metrics.jsonl`, `checkpoints/` and, if asked for, `tensorboard/`. A run found there is
            taken up where it stopped, bit by bit as if it had not been interrupted (``config.resume``); SIGTERM saves
            once more and exits with code 0. All processes write to that of process 0, which they must be able to reach.

    Raises:
        ValueError: an argument does not fit.
        NonFiniteLoss: see ``config.on_nan``.
        CheckpointNotWritten: the disk is full, for example. Training stops at the next report or checkpoint; those
            written before are whole, and the same call goes on from the last of them. Its ``result`` is what was
            trained, where only the last checkpoint of a finished run failed.
        DamagedCheckpoint: there are checkpoints and none can be read.
    """
    enable_cache()
    directory = None if directory is None else local(agreed(str(directory)))
    apply, params, model = _functional(model_or_params, apply, config)
    trained, frozen, join = split(params, config.trainable, config.freeze)
    if optimizer is not None and config.optim != OptimConfig():
        raise ValueError("optimizer: it replaces config.optim, which must then be left at its default")
    if directory is None and (config.checkpoint_every or config.tensorboard or config.best):
        raise ValueError("directory: checkpoint_every, best and tensorboard need a directory to write to")
    if config.best and not config.checkpoint_every:
        raise ValueError("best: it is about checkpoints; set checkpoint_every as well")
    if getattr(eval_data, "endless", False):
        raise ValueError("eval_data: it has no end; make it with epochs=1")
    if (config.best or config.eval_every) and eval_data is None and evaluate is None:
        raise ValueError("eval_data: eval_every and best need eval_data or evaluate")
    rate = None if optimizer is not None else schedule(config.optim, config.steps)
    owners = dict(leaf_paths(params))
    optimizer = make_optimizer(config.optim, config.steps, trained, owners) if optimizer is None else optimizer
    mesh = placement.mesh_of(params) if mesh is None else mesh
    own = lambda tree: tree
    if mesh is None and shardings is None and jax.process_count() > 1:
        mesh, own = make_mesh("data=-1"), placement.own_copy
    if model is not None and mesh is not None:
        apply = constrained(apply, mesh)

    # ---- place the state -------------------------------------------------------------------------------------------
    dtypes = {path: config.compute_dtype or x.dtype for path, x in trained.items()}
    state, frozen = _init(trained, frozen, params, optimizer, config, mesh, shardings)
    plain = {path for path, owner in owners.items() if path == owner}
    lower = lambda p, x: p in plain and config.compute_dtype and jnp.issubdtype(x.dtype, jnp.floating)
    used = {p: x.astype(config.compute_dtype) if lower(p, x) else x for p, x in frozen.items()}

    stream = Stream(data)
    key_data = np.asarray(jax.random.key_data(key)).ravel().tolist()
    checkpoints, frozen_prints, differing = None, {}, ""
    if directory is not None:
        from jaxformers.train.checkpoint import Checkpoints, fingerprints

        checkpoints = Checkpoints(directory / "checkpoints", keep=config.keep, mode=config.best_mode)
        if checkpoints.steps() and not config.resume:
            raise ValueError(f"directory: {checkpoints.directory} holds a run; resume it or name another directory")
        frozen_prints = fingerprints(frozen)
        if checkpoints.steps():
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            del state  # there is no room for two
            state, notes = checkpoints.restore(like)
            differing = _check_same_run(notes, key_data, frozen_prints, config)
            stream.restore(own_state(notes["data"]))

    # ---- compile on first use of a batch shape ---------------------------------------------------------------------
    make = functools.partial(
        make_step, objective, join=join, optimizer=optimizer, dtypes=dtypes, accumulate=config.accumulate,
        ema=config.ema, skip_nonfinite=config.on_nan == "skip",
    )  # fmt: skip
    # model FLOPs, as utilisation is reported, are without what remat computes again
    counted = None if not config.remat else make(_functional(model, None, dataclasses.replace(config, remat=None))[0])
    start = step = int(state.step)
    pinned = None if mesh is None else (jax.tree.map(lambda x: x.sharding, state), None)
    recorder = Recorder(directory, start, config.steps, progress=config.progress, tensorboard=config.tensorboard)
    train_step = Compiled("train step", recorder, make(apply), counted, donate_argnums=0, out_shardings=pinned)
    if config.trainable is None and (narrow := narrowed(params, config.freeze)):
        recorder.say(narrow)
    if differing:
        recorder.say(f"resuming step {start} with other settings than it was saved with: {differing}")
    eval_step = Compiled("evaluation", recorder, make_eval(eval_objective or objective, apply, join, dtypes=dtypes))
    peak = peak_flops()
    peak = None if peak is None else peak * (1 if mesh is None else mesh.size)
    pending: deque[_Pending] = deque()

    def last_checkpoint() -> str:
        steps = [] if checkpoints is None else checkpoints.steps()
        return f"The last checkpoint is {checkpoints.directory / str(steps[-1])}" if steps else "There is no checkpoint"

    def settle(leave: int = 0) -> None:
        """Read the metrics of the steps handed out, all but the last ``leave``: waits for them to finish."""
        while len(pending) > leave:
            item = pending.popleft()
            with watch.waiting():
                metrics = {k: float(v) for k, v in jax.device_get(item.metrics).items()}
            finite, skipped = bool(metrics.pop("finite")), int(metrics.pop("skipped"))
            if not finite:
                told = f"step {item.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
                if config.on_nan == "stop" or skipped > config.max_skips:
                    raise _non_finite(told, item, directory, checkpoints)
                recorder.say(f"{told}; this update is left out ({skipped} in a row)")
                metrics = {}
            recorder.meter.add(metrics, *batch_size(item.batch), item.flops, skipped=not finite)

    def measure() -> dict[str, float]:
        """Evaluate the present parameters (their average where one is kept) and record it."""
        began = time.perf_counter()
        params = state.params if state.ema is None else state.ema
        found: dict[str, float] = {}
        if eval_data is not None:
            batches = itertools.takewhile(lambda _: not stop.at_once, eval_data)
            found = _mean((eval_step(placement.put_batch(b, mesh), params, used), batch_size(b)[0]) for b in batches)
            if not found and not stop.at_once:
                raise ValueError("eval_data: it holds no batch, or cannot be gone through a second time")
        if evaluate is not None and not stop.at_once:
            found |= {k: float(v) for k, v in evaluate(own(join(params, frozen)), step).items()}
        if stop.at_once:
            return {}
        recorder.write({"kind": "eval", "step": step, **found, "seconds": time.perf_counter() - began})
        return found

    def save(scores: Mapping[str, float]) -> None:
        if config.best and scores and config.best not in scores:
            raise ValueError(f"best: evaluation gave {sorted(scores)}, not {config.best!r}")
        notes = {
            "config": dataclasses.asdict(config), "key": key_data, "frozen": frozen_prints,
            "data": gather_states(stream.state()),
        }  # fmt: skip
        score = scores.get(config.best) if config.best else None
        with watch.waiting():
            checkpoints.save(state, notes, score if score is not None and np.isfinite(score) else None)

    watch = Watch(config.peer_timeout, last_checkpoint)
    try:
        with Sigterm(enabled=checkpoints is not None) as stop:
            while step < config.steps:
                batch = stream.next()
                with watch.waiting() if train_step.compiled else contextlib.nullcontext():
                    state, metrics = train_step(placement.put_batch(batch, mesh), state, used, key)
                step += 1
                pending.append(_Pending(step, metrics, batch, stream.state(), train_step.flops))
                settle(leave=1)
                recorder.progress(step)
                due = lambda every: every and (step % every == 0 or step == config.steps)  # noqa: B023
                if due(config.log_every):
                    settle()
                    if checkpoints is not None:
                        checkpoints.check()
                    extra = {} if rate is None else {"learning_rate": float(rate(step - 1))}
                    recorder.write({"kind": "train", "step": step, **recorder.meter.report(peak), **extra})
                scores = {}
                if (eval_data is not None or evaluate is not None) and due(config.eval_every or config.steps):
                    settle()
                    with recorder.meter.paused():
                        scores = measure()
                with watch.waiting():
                    stopping = stop.agreed(ask=due(config.log_every))
                if stopping:
                    settle()
                    save(scores)
                    with watch.waiting():
                        checkpoints.wait()
                    recorder.say(f"SIGTERM: saved step {step} in {checkpoints.directory}; the same call resumes it")
                    raise SystemExit(0)
                if due(config.checkpoint_every):
                    settle()
                    with recorder.meter.paused():
                        save(scores)
            params = own(join(state.params, frozen))
            ema = None if state.ema is None else own(join(state.ema, frozen))
            trained_model = None if model is None else _with_params(model, params)
            result = FitResult(params, ema, trained_model, step, recorder.history)
            if checkpoints is not None:
                with watch.waiting():
                    _wait(checkpoints, result)
    finally:
        watch.close()
        recorder.close()
        if checkpoints is not None:
            checkpoints.close()
    return result


def _wait(checkpoints: Any, result: FitResult) -> None:
    """Until the last checkpoint is on disk; should that fail, what was trained is not lost with it."""
    from jaxformers.train.checkpoint import CheckpointNotWritten

    try:
        checkpoints.wait()
    except CheckpointNotWritten as error:
        error.result = result
        raise


def _functional(given: Any, apply: Callable | None, config: TrainConfig) -> tuple[Any, Any, nnx.Module | None]:
    """(apply, params, model or None) of the three things that `fit` takes."""
    if isinstance(given, nnx.Module):
        if apply is not None:
            raise ValueError("apply: a model brings its own; give apply with a parameter tree")
        from jaxformers.functional import functional

        apply, params = functional(given, scan_layers=config.scan_layers, remat=config.remat)
        return apply, params, given
    if config.scan_layers or config.remat:
        raise ValueError("scan_layers, remat: they are for models; give them to jf.functional and pass its result")
    if isinstance(given, tuple) and len(given) == 2 and callable(given[0]):
        if apply is not None:
            raise ValueError("apply: it is there twice, in the pair and as an argument")
        return given[0], given[1], None
    if not isinstance(given, Mapping):
        raise ValueError(
            f"model_or_params: expected an nnx model, (apply, params) or a parameter dict, got {type(given).__name__}"
        )
    return apply, given, None


def _with_params(model: nnx.Module, params: Any) -> nnx.Module:
    from jaxformers.functional import with_params

    return with_params(model, params)


def _init(
    trained: Flat, frozen: Flat, params: Any, optimizer: optax.GradientTransformation, config: TrainConfig,
    mesh: jax.sharding.Mesh | None, shardings: Any,
) -> tuple[State, Flat]:  # fmt: skip
    """The state before step 1 and the frozen leaves, placed."""
    if mesh is None:
        if shardings is not None:
            raise ValueError("shardings: they need a mesh")
        place = lambda path, x: jnp.asarray(x)
        opt_places = scalar_place = None
    else:
        places = placement.param_shardings(params, mesh, shardings)
        place = lambda path, x: placement.put(x, places[path])
        scalar_place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    masters = {path: master(place(path, x)) for path, x in trained.items()}
    frozen = {path: place(path, x) for path, x in frozen.items()}
    if mesh is not None:
        opt_places = placement.state_shardings(jax.eval_shape(optimizer.init, masters), masters, places, mesh)
    opt = jax.jit(optimizer.init, out_shardings=opt_places)(masters)
    scalar = lambda value: jax.device_put(jnp.int32(value), scalar_place)
    ema = None if config.ema is None else {path: master(x) for path, x in masters.items()}
    return State(scalar(0), masters, opt, ema, scalar(-1), scalar(0)), frozen


def _mean(results: Iterable[tuple[dict[str, jax.Array], int]]) -> dict[str, float]:
    """Means over evaluation batches, by their ``weight`` where there is one, else by their examples."""
    sums: dict[str, float] = {}
    total = 0.0
    for metrics, examples in results:
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        weight = metrics.pop("weight", float(examples))
        total += weight
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + weight * value if weight else sums.get(name, 0.0)
    return {f"eval_{name}": value / total if total else float("nan") for name, value in sums.items()}


def _check_same_run(notes: Mapping, key_data: list[int], frozen_prints: Mapping[str, int], config: TrainConfig) -> str:
    """Refuse a run begun with another key or base; else tell which settings differ, none as a rule."""
    if notes["key"] != key_data:
        raise ValueError("key: the run in this directory was begun with another one; resume with that, or start anew")
    differing = sorted(p for p, v in frozen_prints.items() if notes["frozen"].get(p) != v)
    if differing or notes["frozen"].keys() != frozen_prints.keys():
        raise ValueError(
            f"model_or_params: the frozen parameters are not those of the run in this directory ({differing[:3]} …)"
        )
    now, then = json.loads(json.dumps(dataclasses.asdict(config))), notes["config"]
    looks = ("progress", "tensorboard", "log_every", "resume", "peer_timeout")
    return ", ".join(f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v and k not in looks)


def _non_finite(told: str, item: _Pending, directory: Path | None, checkpoints: Any) -> NonFiniteLoss:
    """The error that names the step, its batch (written to a file) and the last good checkpoint."""
    batch_file = checkpoint = None
    where = f"batch {item.position['drawn']} of pass {item.position['epoch'] + 1} over the data"
    if directory is not None:
        checkpoints.wait()
        steps = checkpoints.steps()
        checkpoint = checkpoints.directory / str(steps[-1]) if steps else None
        batch_file = directory / f"batch-of-step-{item.step}-process-{jax.process_index()}.npz"
        named = jax.tree_util.tree_flatten_with_path(item.batch)[0]
        arrays = {jax.tree_util.keystr(k, simple=True, separator=".") or "batch": np.asarray(x) for k, x in named}
        np.savez(batch_file, **arrays)
        where += f", saved in {batch_file}"
    last = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved"
    message = f"{told}; {where}; {last}. Set on_nan='skip' to leave such updates out."
    return NonFiniteLoss(message, item.step, batch_file, checkpoint)
