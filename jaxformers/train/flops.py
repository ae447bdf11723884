"""Matrix-multiplication FLOPs of a traced function, and what chips can do at most."""

import math
from typing import Any

import jax

# Peak dense bfloat16 (float16 where the chip has no bfloat16) FLOP/s of one JAX device, by the start of its device_kind
# in lower case; longest match wins. From the vendors' data sheets. A TPU v7 chip shows as two devices.
PEAK = {
    "tpu v2": 22.5e12,
    "tpu v3": 61.5e12,
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v5p": 459e12,
    "tpu v6 lite": 918e12,
    "tpu v6e": 918e12,
    "tpu7x": 1153.5e12,
    "tpu v7x": 1153.5e12,
    "nvidia b200": 2250e12,
    "nvidia h200": 989e12,
    "nvidia h100 80gb hbm3": 989e12,
    "nvidia h100 pcie": 756e12,
    "nvidia h100 nvl": 835e12,
    "nvidia a100": 312e12,
    "nvidia l40s": 362e12,
    "nvidia l4": 121e12,
    "nvidia a10g": 70e12,
    "nvidia t4": 65e12,
    "tesla t4": 65e12,
    "tesla v100": 125e12,
}


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Peak FLOP/s of one device (default: the first), or None where it is not known (CPUs among them)."""
    kind = (device or jax.devices()[0]).device_kind.lower()
    known = [name for name in PEAK if kind == name or kind.startswith((name + " ", name + "-"))]
    return PEAK[max(known, key=len)] if known else None


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the dot products and convolutions in a (closed) jaxpr, scans multiplied by their length.

    Two per multiply-add, before sharding: all devices together. The bodies of a ``while`` with unknown trip count
    count once, of a ``cond`` its dearest branch; Pallas kernels as much as their cost estimate says.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
            per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output
        elif name == "pallas_call":
            total += getattr(params.get("cost_estimate"), "flops", 0) or 0
        elif name == "cond":
            total += max(count_flops(branch) for branch in params["branches"])
        else:
            inner = sum(count_flops(v) for v in params.values() if hasattr(getattr(v, "jaxpr", v), "eqns"))
            total += inner * (params["length"] if name == "scan" else 1)
    return total
