"""Compiling kernels for accelerators that this machine does not have.

TPU: libtpu compiles for any topology without a TPU. CUDA: JAX's plugin compiles for a GPU that a text describes;
without the plugin Pallas kernels lower. A compiler that does not like its input may abort the process, so each compile
runs in a subprocess with a time limit.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # the smallest of each; one device of it is used
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")

H100_CONFIG = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800 device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
"""

_CHILD = """
import json, sys
import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

names = {}
exec(sys.argv[1], names)
platform, topology = sys.argv[2], sys.argv[3]
if platform == "cuda":
    device = topologies.get_topology_desc("", platform, target_config=topology, topology="1x1x1").devices[0]
    kind = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
else:
    device = topologies.get_topology_desc(platform=platform, topology_name=topology).devices[0]
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform=platform)
where = SingleDeviceSharding(device)
# Some of Pallas asks for the kind of device while it lowers, and would ask this machine's CPU.
mesh = AbstractMesh((1,), ("x",), abstract_device=kind)
for name, (f, args) in names["cases"].items():
    print("@START " + name, flush=True)
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            compiled = jax.jit(f, in_shardings=where, out_shardings=where).trace(*args)
            compiled = compiled.lower(lowering_platforms=(platform,)).compile()
    except Exception as e:
        text = f"{type(e).__name__}: {e}"
        internal = "INTERNAL" in text or "internal error" in text.lower() or "Mosaic failed" in text and "CHECK" in text
        print("@RESULT " + json.dumps({"name": name, "error": text[:4000], "internal": internal}), flush=True)
        continue
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    try:
        calls = ("tpu_custom_call",) if platform == "tpu" else ("__gpu$xla.gpu.triton", "mosaic_gpu")
        kernels = sum(compiled.as_text().count(f'custom_call_target="{call}') for call in calls)
    except jax.errors.JaxRuntimeError:  # the compiler cannot print every program that it makes
        kernels = None
    print("@RESULT " + json.dumps({
        "name": name, "temporaries": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes,
        "flops": (cost or {}).get("flops"), "kernels": kernels,
    }), flush=True)
"""


def compile_for_tpu(snippet: str, topology: str, timeout: float = 120) -> dict[str, dict[str, Any]]:
    """Compile each of ``snippet``'s ``cases`` for one chip of ``topology`` ("v5e", "v5p" or "v6e"), in a subprocess.

    ``snippet``: Python source that defines ``cases = {name: (function, arguments)}``, with ``jax.ShapeDtypeStruct`` as
    arrays. It runs with the repository on its path; ``timeout`` in seconds is for all cases together. Returns ``{name:
    {"temporaries", "arguments": bytes, "flops", "kernels": how many Pallas kernels the program holds, or None}}``.

    A case that the compiler rejects fails the test with the compiler's message. What says nothing about the kernel (no
    libtpu, an internal compiler error, an aborted process, the time limit) skips it: "could not check".
    """
    if find_spec("libtpu") is None:
        pytest.skip("could not check: libtpu is not installed")
    keep = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_NUM_CPU", "XLA_FLAGS", "JAX_COMPILATION_CACHE"))
    }
    environment = keep | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return _compile(snippet, "tpu", TOPOLOGIES[topology], environment, timeout)


def compile_for_cuda(snippet: str, timeout: float = 120) -> dict[str, dict[str, Any]]:
    """The same for an H100, which needs JAX's plugin for CUDA (``jax[cuda12]`` or newer), but no GPU.

    Machine code included: that shared memory suffices, for one. Without the plugin the test is skipped.
    """
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("could not check: JAX's plugin for CUDA is not installed")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_NUM_CPU", "JAX_COMPILATION_CACHE"))}
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = keep | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    return _compile(snippet, "cuda", H100_CONFIG, environment, timeout)


def _compile(snippet: str, platform: str, topology: str, environment: dict[str, str], timeout: float):
    command = [sys.executable, "-c", _CHILD, snippet, platform, topology]
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.skip(f"could not check: compiling for {platform} took more than {timeout:.0f} s")
    lines = done.stdout.splitlines()
    results = {}
    for line in lines:
        if line.startswith("@RESULT "):
            result = json.loads(line[len("@RESULT ") :])
            results[result.pop("name")] = result
    rejected = {name: r["error"] for name, r in results.items() if "error" in r and not r["internal"]}
    assert not rejected, "\n\n".join(f"{platform}, {name}: {error}" for name, error in rejected.items())
    if done.returncode < 0 or done.returncode == 134:
        begun = [line[len("@START ") :] for line in lines if line.startswith("@START ")]
        pytest.skip(f"could not check: the compiler for {platform} aborted at {begun[-1:]}: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-4000:]
    internal = {name: r["error"] for name, r in results.items() if "error" in r}
    if internal:
        pytest.skip(f"could not check: internal error of the compiler for {platform}: {internal}")
    return results


def lower_for_cuda(f: Callable, *args: Any, device: AbstractDevice = H100) -> str:
    """The StableHLO text of ``f(*args)`` lowered for an NVIDIA GPU (an H100), Pallas kernels included.

    ``args`` may be ``jax.ShapeDtypeStruct``. The kernels are lowered to their own IR, not compiled to machine code:
    what Triton or Mosaic refuses raises here. ``jax.default_backend()`` stays what it is, so name the kernel to use.
    """
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
