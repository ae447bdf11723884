"""Where the program that is being traced will run."""

import jax


def platform() -> str:
    """The platform: "cpu", "gpu" (NVIDIA's Hopper) or "tpu"; "other" where no kernel may be used.

    Kernels are not partitioned by XLA, so a program for several devices has none outside ``shard_map``. JAX tells
    while tracing which mesh it is for only where one is set; without that, several devices on this machine count. The
    tiles of the GPU kernels were measured on an H100 and may not fit into the shared memory of other kinds.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        device, alone = jax.devices()[0], jax.device_count() == 1
    else:
        device = mesh.abstract_device or jax.devices()[0]
        alone = mesh.size == 1 or all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)
    if device.platform == "cpu" or not alone:
        return "cpu" if device.platform == "cpu" else "other"
    if device.platform in ("gpu", "cuda"):
        hopper = device.device_kind.startswith(("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200"))
        return "gpu" if hopper else "other"
    return device.platform
