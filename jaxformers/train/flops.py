"""What chips can do at most: the denominator of a model's FLOPs utilisation (its numerator: `jaxformers.cost`)."""

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
