"""Compiling kernels for accelerators that this machine does not have.

TPU: libtpu compiles for any topology without a TPU. A compiler that does not like its input may abort the process, so
each compile runs in a subprocess with a time limit. CUDA: without a GPU there is no compile, but Pallas kernels lower.
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

_CHILD = """
import json, sys
import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

names = {}
exec(sys.argv[1], names)
device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[2]).devices[0]
where = SingleDeviceSharding(device)
# Some of Pallas asks for the kind of TPU while it lowers, and would ask this machine's CPU.
kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
mesh = AbstractMesh((1,), ("x",), abstract_device=kind)
for name, (f, args) in names["cases"].items():
    print("@START " + name, flush=True)
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            compiled = jax.jit(f, in_shardings=where, out_shardings=where).trace(*args).lower().compile()
    except Exception as e:
        text = f"{type(e).__name__}: {e}"
        internal = "INTERNAL" in text or "internal error" in text.lower() or "Mosaic failed" in text and "CHECK" in text
        print("@RESULT " + json.dumps({"name": name, "error": text[:4000], "internal": internal}), flush=True)
        continue
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    try:
        kernels = compiled.as_text().count("tpu_custom_call")
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
    command = [sys.executable, "-c", _CHILD, snippet, TOPOLOGIES[topology]]
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.skip(f"could not check: compiling for {topology} took more than {timeout:.0f} s")
    lines = done.stdout.splitlines()
    results = {}
    for line in lines:
        if line.startswith("@RESULT "):
            result = json.loads(line[len("@RESULT ") :])
            results[result.pop("name")] = result
    rejected = {name: r["error"] for name, r in results.items() if "error" in r and not r["internal"]}
    assert not rejected, "\n\n".join(f"{topology}, {name}: {error}" for name, error in rejected.items())
    if done.returncode < 0 or done.returncode == 134:
        begun = [line[len("@START ") :] for line in lines if line.startswith("@START ")]
        pytest.skip(f"could not check: the compiler for {topology} aborted at {begun[-1:]}: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-4000:]
    internal = {name: r["error"] for name, r in results.items() if "error" in r}
    if internal:
        pytest.skip(f"could not check: internal error of the compiler for {topology}: {internal}")
    return results


def lower_for_cuda(f: Callable, *args: Any, device: AbstractDevice = H100) -> str:
    """The StableHLO text of ``f(*args)`` lowered for an NVIDIA GPU (an H100), Pallas kernels included.

    ``args`` may be ``jax.ShapeDtypeStruct``. The kernels are lowered to their own IR, not compiled to machine code:
    what Triton or Mosaic refuses raises here. ``jax.default_backend()`` stays what it is, so name the kernel to use.
    """
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
