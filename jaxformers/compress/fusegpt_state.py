"""What a FuseGPT run is after each round, on disk: the layers with their grafts, and the rounds so far.

One file, written beside and renamed. Donors are stored once, however many layers they were grafted into; layers that no
round has touched are not stored.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers import atomic, paths, weights
from jaxformers.compress.depth import Inputs, Layer
from jaxformers.compress.sweep import fingerprint
from jaxformers.safetensors_io import SafetensorsFile
from jaxformers.weights import Grafted, LowRank

log = logging.getLogger(__name__)
FILE = "fusegpt.safetensors"


class State:
    """The state file of one run in a directory; ``read`` gives back only what the same run has written."""

    def __init__(self, directory: Path, config: Any, key: jax.Array, layers: Sequence[Layer], inputs: Inputs):
        self.file, self.layers = directory / FILE, list(layers)
        seed = np.asarray(jax.random.key_data(key))
        told = json.dumps(dataclasses.asdict(config), sort_keys=True)
        self.key = fingerprint(told, [seed, inputs.x, [layer.params for layer in layers]])

    def write(self, rounds: list[dict[str, Any]], layers: Sequence[Layer]) -> None:
        """Replace what is there by the state after ``rounds``."""
        from safetensors.numpy import save

        tensors: dict[str, np.ndarray] = {}
        donors: dict[int, str] = {}  # by identity: layers of a group share their donor's arrays
        shape: dict[str, dict[str, Any]] = {}
        for layer in layers:
            flat = paths.flatten(layer.params)
            if any(weights.is_typed(w) for w in flat.values()):
                own = {path: _described(w, f"{layer.number}/{path}", tensors, donors) for path, w in flat.items()}
                shape[str(layer.number)] = own
        told = {"rounds": rounds, "kept": [layer.number for layer in layers], "layers": shape}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        data = save(tensors, metadata={"key": self.key, "state": json.dumps(told)})
        atomic.write_bytes_atomic(self.file, data)

    def read(self) -> tuple[list[dict[str, Any]], list[Layer]] | None:
        """(rounds, layers); None when there is nothing, or it is another run's."""
        if not self.file.is_file():
            return None
        found = SafetensorsFile(self.file)
        if found.metadata.get("key") != self.key:
            log.warning("%s: from another configuration, calibration or model; starting anew", self.file)
            return None
        told = json.loads(found.metadata["state"])
        arrays = {name: jnp.asarray(found[name].read()) for name in found}
        layers = []
        for number in told["kept"]:
            layer, shape = self.layers[number], told["layers"].get(str(number))
            if shape is not None:
                layer = layer._replace(params=paths.unflatten({p: _rebuilt(d, arrays) for p, d in shape.items()}))
            layers.append(layer)
        rounds = [{**r, **{n: tuple(r[n]) for n in ("layers", "influence", "group")}} for r in told["rounds"]]
        return rounds, layers


def _described(w: Any, name: str, tensors: dict[str, np.ndarray], donors: dict[int, str]) -> Any:
    """``w`` as JSON that names the tensors its arrays went to."""
    put = lambda array, own: (tensors.__setitem__(own, np.ascontiguousarray(array)), own)[1]
    if isinstance(w, Grafted):
        if id(w.donor) not in donors:
            donors[id(w.donor)] = put(w.donor, f"donor/{len(donors)}")
        own = {n: put(getattr(w, n), f"{name}/{n}") for n in ("c", "d") if getattr(w, n) is not None}
        return {"base": _described(w.base, f"{name}/base", tensors, donors), "donor": donors[id(w.donor)], **own}
    if isinstance(w, LowRank):
        own = {n: put(getattr(w, n), f"{name}/{n}") for n in ("a", "b")}
        return {"base": _described(w.base, f"{name}/base", tensors, donors), **own}
    return put(w, name)


def _rebuilt(told: Any, arrays: dict[str, jax.Array]) -> Any:
    if isinstance(told, str):
        return arrays[told]
    parts = {n: _rebuilt(part, arrays) for n, part in told.items()}
    return Grafted(**parts) if "donor" in parts else LowRank(**parts, scale=1.0)
