"""What TPU generations have: memory, bandwidths, peak FLOP/s; and the topologies that can be compiled for without one.

Memory is what libtpu 0.0.42 grants a program (its compile errors tell). Bandwidths and FLOP/s are the vendor's figures
(cloud.google.com/tpu/docs, "How to Scale Your Model" by the JAX team): upper bounds, that no program reaches.
"""

import dataclasses
import math
import re
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One *device* as JAX shows it (two of them make a chip of v4 and TPU7x when compiled for ahead of time).

    ``memory`` bytes of HBM that a program may use, ``hbm`` bytes/s to and from it, ``flops`` peak bfloat16 FLOP/s,
    ``ici`` bytes/s that a device can send to its neighbours over all its links together.
    """

    memory: float
    hbm: float
    flops: float
    ici: float


CHIPS: dict[str, Chip] = {
    "v4": Chip(15.25 * GIB, 0.614e12, 137.5e12, 135e9),
    "v5e": Chip(15.75 * GIB, 0.819e12, 197e12, 180e9),
    "v5p": Chip(95.73 * GIB, 2.765e12, 459e12, 540e9),
    "v6e": Chip(31.24 * GIB, 1.64e12, 918e12, 360e9),
    "tpu7x": Chip(94.74 * GIB, 3.69e12, 1153.5e12, 300e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as ``"v5p:4x4x4"``. Raises ValueError for one that is not known."""
    generation = topology.split(":")[0].lower()
    if generation not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)*", topology):
        known = ", ".join(CHIPS)
        raise ValueError(f"topology {topology!r}: expected a generation ({known}) and a shape, such as v5p:4x4x4")
    return CHIPS[generation]


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology that is not there, to compile for; they cannot run anything.

    Needs libtpu (``pip install 'jaxformers[test]'`` or ``jax[tpu]``; x86-64 Linux), but no TPU. Raises ValueError for a
    shape that does not exist, ImportError without libtpu.
    """
    import importlib.util

    chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("dry runs compile with libtpu, which is not installed: pip install libtpu (x86-64 Linux)")
    from jax.experimental import topologies

    options = {}
    sizes = [int(n) for n in topology.split(":")[1].split("x")]
    if math.prod(sizes) == 1:  # a single chip is a host of its own
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # libtpu raises several kinds, all with an explanation
        raise ValueError(f"topology {topology!r}: {(str(error).splitlines() or [''])[0][:300]}") from None
