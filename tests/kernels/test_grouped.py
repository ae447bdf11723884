"""Grouped products: every implementation against a loop, gradients, and what the compilers for TPUs make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import aot

from jaxformers.kernels import grouped
from jaxformers.kernels.grouped import grouped_matmul

SIZES = {"even": (4, 4, 4), "uneven": (1, 0, 9), "one": (0, 13, 0), "rest": (3, 0, 2), "none": (0, 0, 0)}


def problem(sizes, k=128, n=256, rows=13):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return draw(rows, k), draw(len(sizes), k, n), np.asarray(sizes, np.int32)


def looped(x, w, sizes):
    y = np.zeros((len(x), w.shape[2]))
    ends = np.cumsum(sizes)
    for g, end in enumerate(ends):
        y[end - sizes[g] : end] = x[end - sizes[g] : end].astype(np.float64) @ w[g]
    return y


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_a_loop(sizes, implementation):
    args = problem(sizes)
    f = jax.jit(lambda *a: grouped_matmul(*a, implementation=implementation, interpret=True))
    assert np.abs(f(*args) - looped(*args)).max() < 1e-4


@pytest.mark.parametrize("sizes", [(4, 0, 9), (3, 0, 2), (0, 0, 0)])
def test_gradients_of_the_kernel(sizes):
    x, w, sizes = problem(sizes)
    weights = np.random.default_rng(1).standard_normal((13, 256)).astype(np.float32)

    def loss(implementation):
        return lambda x, w: jnp.sum(
            weights * grouped_matmul(x, w, sizes, implementation=implementation, interpret=True)
        )

    both = [jax.jit(jax.grad(loss(name), argnums=(0, 1)))(x, w) for name in ("pallas_tpu", "xla")]
    for found, expected in zip(*both, strict=True):
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


SNIPPET = """
import jax, jax.numpy as jnp
from jaxformers.kernels.grouped import grouped_matmul
cases = {}
for dtype in (jnp.bfloat16, jnp.float32):
    for m, k, n, g in ((1000, 7168, 2048, 8), (24, 256, 512, 4)):
        args = (jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((g, k, n), dtype),
                jax.ShapeDtypeStruct((g,), jnp.int32))
        loss = lambda x, w, sizes: grouped_matmul(x, w, sizes).astype(jnp.float32).sum()
        cases[f"{dtype.__name__} {m}"] = (grouped_matmul, args)
        cases[f"{dtype.__name__} {m} gradient"] = (jax.grad(loss, argnums=(0, 1)), args)
cases["odd"] = (grouped_matmul, (jax.ShapeDtypeStruct((64, 200), jnp.float32),
                                 jax.ShapeDtypeStruct((4, 200, 72), jnp.float32), args[2]))
"""


@pytest.mark.parametrize("topology", ["v5e", "v6e", "v5p"])
def test_compiles_for_tpus_at_the_cost_of_one_product(topology):
    found = aot.compile_for_tpu(SNIPPET, topology, timeout=240)
    for name, case in found.items():
        if name == "odd":
            continue
        m, k, n = (1000, 7168, 2048) if "1000" in name else (24, 256, 512)
        products = 2 if "gradient" in name else 1
        assert case["kernels"] is None or case["kernels"] >= products, name
        assert case["flops"] <= 1.4 * products * 2 * m * k * n, name  # of 8 or 4 groups; rows are padded to tiles


def test_choice_is_by_the_kind_of_tpu():
    from jax.sharding import AbstractDevice, AbstractMesh

    for kind, expected in (("TPU v5 lite", "pallas_tpu"), ("TPU v6 lite", "pallas_tpu"), ("TPU v5", "xla")):
        device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            assert grouped.choose((8, 256, 512), jnp.bfloat16) == expected
            assert grouped.choose((8, 200, 512), jnp.bfloat16) == "xla"
            assert grouped.choose((8, 256, 512), jnp.float16) == "xla"


def test_shapes_that_do_not_fit():
    x, w, sizes = problem((4, 4, 4))
    with pytest.raises(ValueError, match=r"expected \(M, K\), \(G, K, N\) and \(G,\), got \(13, 127\)"):
        grouped_matmul(x[:, 1:], w, sizes)
    with pytest.raises(ValueError, match="multiples of 128 inputs and outputs, got 128 and 200"):
        grouped_matmul(x, w[..., :200], sizes, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="expected xla or pallas_tpu, got 'cuda'"):
        grouped_matmul(x, w, sizes, implementation="cuda")
