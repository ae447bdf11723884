"""Training state on disk: Orbax for the arrays, beside them what Orbax does not keep.

Each checkpoint holds the arrays under readable names (``params/layers.0.mlp.up.kernel``, ``opt/…``, ``ema/…``) and a
JSON part with their shapes, a fingerprint of every array's contents, the data position and the caller's notes. Orbax
renames a checkpoint into place when it is whole, but reads whatever bytes lie there later; the fingerprints, taken on
the device before saving, tell a damaged checkpoint from a good one on any mesh.
"""

import gc
import json
import logging
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxformers.train.logs import local
from jaxformers.train.state import Flat, State, leaf_paths

FORMAT = 1


class DamagedCheckpoint(ValueError):
    """The files of a checkpoint are not what was saved."""


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written, on a full disk for example; the ones before it are whole.

    ``step``: the newest whole one, None without any. ``result``: the `FitResult` where training had come to its end.
    """

    def __init__(self, message: str, step: int | None):
        super().__init__(message)
        self.step, self.result = step, None


class Checkpoints:
    """The checkpoints of one run, ``directory/<step>``: the newest ``keep`` and the best one stay."""

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, mode: str = "min"):
        if keep < 1:
            raise ValueError(f"keep: expected 1 or more checkpoints, got {keep}")
        if mode not in ("min", "max"):
            raise ValueError(f"best_mode: expected min or max, got {mode!r}")
        self.directory = Path(directory).absolute()
        self._keep, self._sign = keep, 1.0 if mode == "max" else -1.0
        self._manager: ocp.CheckpointManager | None = None
        self.scores: dict[int, float] = {}

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, damaged or not, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir())

    def best_step(self) -> int | None:
        """The step with the best score among those saved with one."""
        return max(self.scores, key=lambda s: (self._sign * self.scores[s], s)) if self.scores else None

    def save(self, state: State, notes: Mapping[str, Any], score: float | None = None) -> int:
        """Begin to write ``state``; the arrays are copied before this returns, the files follow in the background.

        Returns the step. A step that is there already is not written again. Raises :class:`CheckpointNotWritten` when
        this one cannot be, or the one before it could not.
        """
        step = int(state.step)
        if self._manager is None:
            self._open()
        if step in self._manager.all_steps():
            return step
        self._try("check_for_errors")
        arrays = to_arrays(state)
        meta = {
            "format": FORMAT,
            "step": step,
            "score": score,
            "sign": self._sign,
            "arrays": {k: [list(x.shape), str(x.dtype)] for k, x in arrays.items()},
            "fingerprints": fingerprints(arrays),
            "notes": dict(notes),
        }
        meta["crc32"] = _crc(meta)
        if score is not None:
            self.scores[step] = score
        saved = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        self._try("save", step, args=saved, force=True)
        self.scores = {s: v for s, v in self.scores.items() if s in self._manager.all_steps()}
        return step

    def restore(self, like: State) -> tuple[State, dict] | None:
        """(state, notes) of the newest good checkpoint in the shapes and shardings of ``like``; None without any.

        Damaged ones are named on stderr and moved to ``<directory>-damaged``. ``like``, arrays or shapes with their
        shardings, may be on another mesh than the state that was saved.

        Raises ValueError when the checkpoint is of a model or optimiser with other arrays, and
        :class:`DamagedCheckpoint` when there are checkpoints and every one is damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                meta = read_meta(self.directory / str(step))
                state = from_arrays(_read_arrays(self.directory / str(step), meta, to_arrays(like)), like)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            self._read_scores()
            return state, meta["notes"]
        if damaged:
            told = "; ".join(f"step {s}: {why}" for s, why in damaged.items())
            raise DamagedCheckpoint(f"no checkpoint in {self.directory} can be read ({told})")
        return None

    def check(self) -> None:
        """Raises :class:`CheckpointNotWritten` when the background thread has failed; does not wait for it."""
        if self._manager is not None:
            self._try("check_for_errors")

    def wait(self) -> None:
        """Until everything begun is on disk. Raises :class:`CheckpointNotWritten` when that failed."""
        if self._manager is not None:
            self._try("wait_until_finished")

    def close(self) -> None:
        """`wait`, and let go of Orbax's threads."""
        if self._manager is not None:
            self._try("close")
            self._manager = None

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call Orbax's manager; after a failure remove what it left and raise :class:`CheckpointNotWritten`."""
        log, told = logging.getLogger("absl"), ""
        before, log.disabled = log.disabled, True  # it prints each of its threads' tracebacks
        try:
            getattr(self._manager, method)(*args, **kwargs)
        except Exception as error:  # Orbax and TensorStore raise many kinds, none of them OSError
            told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:600]}"
        finally:
            log.disabled = before
        if not told:
            return
        self._manager = None
        _drop_futures()
        for left in self.directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(left, ignore_errors=True)
        whole = self.steps()
        last = f"the last whole one is of step {whole[-1]}" if whole else "there is none yet"
        message = f"a checkpoint could not be written to {self.directory}, {last} ({told})"
        raise CheckpointNotWritten(message, whole[-1] if whole else None)

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(self), enable_async_checkpointing=True, lightweight_initialize=True, create=True,
            cleanup_tmp_directories=True,
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta"))

    def _read_scores(self) -> None:
        for step in self.steps():
            try:
                score = read_meta(self.directory / str(step))["score"]
            except DamagedCheckpoint:
                continue
            if score is not None:
                self.scores[step] = score

    def _set_aside(self, damaged: Mapping[int, str], used: int) -> None:
        for step, why in damaged.items():
            aside = self.directory.with_name(self.directory.name + "-damaged") / f"{step}"
            if jax.process_index() == 0:
                aside.parent.mkdir(exist_ok=True)
                while aside.exists():
                    aside = aside.with_name(aside.name + "-again")
                os.replace(self.directory / str(step), aside)
                print(
                    f"checkpoint {step} in {self.directory} is damaged ({why}); using {used} instead", file=sys.stderr
                )
        if damaged and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("jaxformers: damaged checkpoints moved")


class _Keep:
    """Orbax's preservation policy: the newest n and the best."""

    def __init__(self, checkpoints: Checkpoints):
        self._owner = checkpoints

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        newest = {info.step for info in checkpoints[-self._owner._keep :]}
        return [info.step in newest or info.step == self._owner.best_step() for info in checkpoints]


def to_arrays(state: State) -> Flat:
    """A state as one flat dict with readable names."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): x for keys, x in flat}


def from_arrays(arrays: Mapping[str, jax.Array], like: State) -> State:
    """The inverse of :func:`to_arrays`, in the structure of ``like``."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in to_arrays(like)])


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A 32-bit number for each array that any change of one word changes, whatever the sharding.

    The sum of (2 i + 1) · word_i modulo 2³² over the bit patterns: integers, so no order of summation matters.
    """
    begun = {name: _fingerprint(x) for name, x in arrays.items()}
    return {name: int(value) for name, value in jax.device_get(begun).items()}


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_ or x.dtype.name in ("int2", "uint2", "int4", "uint4"):
        x = x.astype(jnp.uint8)
    elif x.dtype.itemsize == 1:
        x = jax.lax.bitcast_convert_type(x, jnp.uint8)
    elif x.dtype.itemsize == 2:
        x = jax.lax.bitcast_convert_type(x, jnp.uint16)
    else:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)  # 8-byte words gain an axis of 2
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride & 0xFFFFFFFF)
        stride *= x.shape[axis]
    return jnp.sum(x.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def read_meta(step_directory: Path) -> dict:
    """The JSON part of a checkpoint. Raises :class:`DamagedCheckpoint` when it is not what was written."""
    path = step_directory / "meta" / "metadata"
    try:
        meta = json.loads(path.read_bytes())
        crc = meta.pop("crc32")
        good = crc == _crc(meta)
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name}: {type(error).__name__}: {error}") from error
    if not good:
        raise DamagedCheckpoint(f"{path.name}: its checksum does not fit")
    if meta["format"] != FORMAT:
        raise ValueError(f"{step_directory} was written in format {meta['format']}; this version reads {FORMAT}")
    return meta


def load_params(directory: str | os.PathLike, like: Any, *, step: int | str = "latest", ema: bool = False) -> Any:
    """Parameters out of a run's checkpoints, in the structure, shardings and order of ``like`` (arrays or shapes).

    ``directory`` is what `fit` was given; ``like`` the parameters it was given (or `jax.eval_shape` of them). Leaves
    that were frozen are not in checkpoints: they come from ``like``, which must then hold their arrays. ``step`` is a
    number, "latest" or "best"; ``ema`` asks for the moving average.

    Raises ValueError when there is no such checkpoint, :class:`DamagedCheckpoint` when it is damaged.
    """
    checkpoints = Checkpoints(local(directory) / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"directory: there is no checkpoint in {checkpoints.directory}")
    if step == "best":
        metas = {s: read_meta(checkpoints.directory / str(s)) for s in steps}
        scored = {s: m["sign"] * m["score"] for s, m in metas.items() if m["score"] is not None}
        if not scored:
            raise ValueError("step: no checkpoint has a score; this run was started without config.best")
        step = max(scored, key=lambda s: (scored[s], s))
    step = steps[-1] if step == "latest" else step
    if step not in steps:
        raise ValueError(f"step: there is no checkpoint of step {step}; there are {steps}")
    meta = read_meta(checkpoints.directory / str(step))
    part = "ema/" if ema else "params/"
    wanted = {}
    leaves, treedef = jax.tree.flatten(like)
    names = [path for path, _ in leaf_paths(like)]
    for path, x in zip(names, leaves, strict=True):
        if part + path in meta["arrays"]:
            dtype = meta["arrays"][part + path][1]
            wanted[part + path] = jax.ShapeDtypeStruct(x.shape, dtype, sharding=getattr(x, "sharding", None))
        elif isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(f"like: {path} was frozen and is not in the checkpoint; give its array")
    if not wanted:
        raise ValueError(f"like: the checkpoint holds {'no moving average' if ema else 'none of its parameters'}")
    read = _read_arrays(checkpoints.directory / str(step), meta, wanted, partial=True)
    return treedef.unflatten([read.get(part + path, x) for path, x in zip(names, leaves, strict=True)])


def _read_arrays(step_directory: Path, meta: Mapping, like: Mapping[str, Any], partial: bool = False) -> Flat:
    saved = meta["arrays"]
    wanted = {k: [list(x.shape), str(x.dtype)] for k, x in like.items()}
    if any(saved.get(k) != v for k, v in wanted.items()) or (not partial and saved.keys() != wanted.keys()):
        names = sorted(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
        told = "; ".join(f"{k}: saved {saved.get(k)}, expected {wanted.get(k)}" for k in names[:3])
        raise ValueError(f"{step_directory} is of another model or optimiser: {len(names)} arrays differ ({told})")
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default)
        for k, x in like.items()
    }
    try:
        with ocp.PyTreeCheckpointer() as reader:
            kinds = jax.tree.map(lambda t: ocp.ArrayRestoreArgs(sharding=t.sharding, dtype=t.dtype), targets)
            args = ocp.args.PyTreeRestore(targets, restore_args=kinds, partial_restore=partial)
            arrays = reader.restore(step_directory / "state", args=args)
    except Exception as error:  # Orbax and TensorStore raise many kinds for files that are not what they wrote
        told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    else:
        told = ""
    if told:
        _drop_futures()
        raise DamagedCheckpoint(told)
    prints = fingerprints(arrays)
    wrong = sorted(k for k, v in prints.items() if v != meta["fingerprints"][k])
    if wrong:
        raise DamagedCheckpoint(f"the contents of {', '.join(wrong[:3])}{', …' * (len(wrong) > 3)} have changed")
    return arrays


def _drop_futures() -> None:
    """Collect what a failure leaves: every future that was not waited for would print a traceback at some time."""
    log = logging.getLogger("asyncio")
    before, log.disabled = log.disabled, True
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
    log.disabled, sys.unraisablehook = before, hook


def _crc(meta: Mapping) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "crc32"}, sort_keys=True).encode())
