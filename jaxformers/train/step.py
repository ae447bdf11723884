"""The training step as a pure function of (state, frozen parameters, batch, key), and its evaluation twin."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformers.cost import count_flops
from jaxformers.nn.norms import follow
from jaxformers.train.state import Flat, State

Join = Callable[[Mapping, Mapping], Any]


def make_step(
    objective: Callable,
    apply: Any,
    join: Join,
    optimizer: optax.GradientTransformation,
    *,
    dtypes: Mapping[str, Any],
    accumulate: int = 1,
    ema: float | None = None,
    skip_nonfinite: bool = False,
) -> Callable[[State, Flat, Any, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """``step(state, frozen, batch, key) -> (state, metrics)``, to be jitted with the state donated.

    Gradients are taken with respect to the float32 masters in ``state.params``, which the objective sees in ``dtypes``
    ({path: dtype}). ``accumulate`` micro-batches of every k-th example are run one after another and averaged by
    ``metrics["weight"]``. An update that is not finite is never applied; without ``skip_nonfinite`` neither is any
    after it, so that whoever reads the metrics a step late still finds the last good parameters. Parameters named in
    ``metrics["running"]`` follow what stands there instead of the optimiser, unless they are frozen.
    """

    def losses(params: Flat, frozen: Flat, batch: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        computed = {path: x.astype(dtypes[path]) for path, x in params.items()}
        return checked(objective(apply, join(computed, frozen), batch, key))

    value_and_grad = jax.value_and_grad(losses, has_aux=True)

    def one(params: Flat, frozen: Flat, batch: Any, key: jax.Array) -> tuple:
        (loss, metrics), grads = value_and_grad(params, frozen, batch, key)
        return grads, {"loss": loss, **metrics}

    def many(params: Flat, frozen: Flat, batch: Any, key: jax.Array) -> tuple:
        """Weighted sums over the micro-batches by a scan, divided by the total weight at the end."""
        micro = jax.tree.map(lambda x: _micro_batches(x, accumulate), batch)

        def add(total: Any, inputs: tuple) -> tuple[Any, None]:
            part, i = inputs
            grads, metrics = one(params, frozen, part, jax.random.fold_in(key, i))
            weight = metrics.pop("weight", jnp.float32(1.0))
            weighted = jax.tree.map(lambda x: x * weight, (grads, metrics))
            return jax.tree.map(jnp.add, total, (*weighted, weight)), None

        grads, metrics = jax.eval_shape(one, params, frozen, jax.tree.map(lambda x: x[0], micro), key)
        weighed = metrics.pop("weight", None) is not None
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics, jnp.float32(0)))
        (grads, metrics, weight), _ = jax.lax.scan(add, zero, (micro, jnp.arange(accumulate)))
        # a batch without a single target has weight 0 and gradient 0: keep it 0 instead of 0 / 0
        scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        grads, metrics = jax.tree.map(lambda x: x * scale, (grads, metrics))
        return grads, {**metrics, "weight": weight} if weighed else metrics

    def step(state: State, frozen: Flat, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        grads, metrics = (one if accumulate == 1 else many)(state.params, frozen, batch, key)
        running = _statistics(metrics.pop("running", {}), state.params, frozen)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        good = finite if skip_nonfinite else finite & (state.failed < 0)

        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        params |= {path: follow(state.params[path], batch_statistic) for path, batch_statistic in running.items()}
        average = state.ema
        if ema is not None:
            average = jax.tree.map(lambda a, p: ema * a + (1.0 - ema) * p, state.ema, params)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        new = State(
            step=state.step + 1,
            params=keep(params, state.params),
            opt=keep(opt, state.opt),
            ema=keep(average, state.ema),
            failed=jnp.where((state.failed < 0) & ~finite, state.step + 1, state.failed),
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        return new, {**metrics, "grad_norm": norm, "finite": finite, "skipped": new.skipped}

    return step


def make_eval(objective: Callable, apply: Any, join: Join, *, dtypes: Mapping[str, Any]) -> Callable:
    """``evaluate(params, frozen, batch) -> {"loss": …, metrics…}`` with the objective's key None: no dropout."""

    def evaluate(params: Flat, frozen: Flat, batch: Any) -> dict[str, jax.Array]:
        computed = {path: x.astype(dtypes[path]) for path, x in params.items()}
        loss, metrics = checked(objective(apply, join(computed, frozen), batch, None))
        return {"loss": loss, **{name: value for name, value in metrics.items() if name != "running"}}

    return evaluate


class Compiled:
    """A jitted function compiled ahead of time for each new shape of its batch, and how long that took.

    ``f(first, frozen, batch, …)`` is called as ``compiled(batch, first, frozen, …)``. ``flops`` are the matrix products
    of the program used last, over all devices; they are counted in ``counted``, which is ``f`` without what it computes
    twice to save memory (default: ``f``).
    """

    def __init__(self, name: str, recorder: Any, f: Callable, counted: Callable | None = None, **jit_options: Any):
        self.flops = 0.0
        self._name, self._recorder, self._counted = name, recorder, counted
        self._jitted, self._programs = jax.jit(f, **jit_options), {}

    @property
    def compiled(self) -> bool:
        """Whether a program is there: the first call takes the compiler's time."""
        return bool(self._programs)

    def __call__(self, batch: Any, first: Any, frozen: Any, *rest: Any) -> Any:
        leaves, treedef = jax.tree.flatten(batch)
        shape = (treedef, *((x.shape, x.dtype) for x in leaves))
        args = (first, frozen, batch, *rest)
        if shape not in self._programs:
            times = [time.perf_counter()]
            with self._recorder.meter.paused():
                traced = self._jitted.trace(*args)
                times.append(time.perf_counter())
                program = traced.lower().compile()
                times.append(time.perf_counter())
                jaxpr = traced.jaxpr if self._counted is None else jax.make_jaxpr(self._counted)(*args)
            self._programs[shape] = program, count_flops(jaxpr)
            trace, compile_ = times[1] - times[0], times[2] - times[1]
            self._recorder.compiled(self._name, trace, compile_, self._programs[shape][1], len(self._programs))
        program, self.flops = self._programs[shape]
        return program(*args)


def checked(result: Any) -> tuple[jax.Array, dict[str, Any]]:
    """What an objective returned, in float32. Raises ValueError, while tracing, when it is not (scalar, dict)."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise ValueError("objective: expected it to return (loss, metrics) with metrics a dict of scalars")
    loss, metrics = result[0], dict(result[1])
    running = metrics.pop("running", {})
    for name, value in {"loss": loss, **metrics}.items():
        if jnp.shape(value) != ():
            raise ValueError(f"objective: {name} has shape {jnp.shape(value)}, expected a scalar")
    taken = {"loss", "grad_norm", "finite", "skipped"} & metrics.keys()
    if taken:
        raise ValueError(f"objective: the metrics {sorted(taken)} are reported by the loop; choose other names")
    metrics = {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
    if running:
        metrics["running"] = {path: jnp.asarray(v, jnp.float32) for path, v in running.items()}
    return jnp.asarray(loss, jnp.float32), metrics


def _statistics(running: Mapping[str, jax.Array], trained: Flat, frozen: Flat) -> Flat:
    """The ``running`` statistics of trained parameters. Raises ValueError for what is no parameter of that shape."""
    for path, value in running.items():
        known = trained.get(path, frozen.get(path))
        if known is None or known.shape != value.shape:
            there = "is none" if known is None else f"has shape {known.shape}, not {value.shape}"
            raise ValueError(f"objective: running names parameters and their batch's statistics; {path} {there}")
    return {path: value for path, value in running.items() if path in trained}


def _micro_batches(x: Any, k: int) -> jax.Array:
    """(B, …) -> (k, B / k, …), example i in micro-batch i mod k: each holds a share of every device's examples."""
    if np.ndim(x) == 0 or np.shape(x)[0] % k:
        raise ValueError(f"accumulate: a batch leaf of shape {np.shape(x)} does not split into {k} equal parts")
    return jnp.swapaxes(x.reshape(x.shape[0] // k, k, *x.shape[1:]), 0, 1)
