"""Low-bit kernels: against dense products in the interpreter, and compiled for accelerators that are not here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot

from jaxformers.kernels import lowbit, lowbit_gpu, lowbit_tpu
from jaxformers.kernels.shape import Shape
from jaxformers.weights import words
from jaxformers.weights.packed import PackedWeight
from jaxformers.weights.ternary import TernaryWeight

KINDS = ("2", "3", "4", "8", "ternary")
BOUNDS = {"float32": 1e-5, "float16": 1.5e-3, "bfloat16": 8e-3}  # of the largest output


def operands(kind, k, n, group_size, act_order=False, seed=0):
    """({name: array} for the product, the dense matrix in float64), made by the packing that is tested on its own."""
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    g_idx = np.arange(k) // (k if group_size == -1 else group_size)
    g_idx = rng.permutation(g_idx) if act_order else g_idx
    scales = rng.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
    order = jnp.asarray(g_idx, jnp.int32) if act_order else None
    if kind == "ternary":
        codes = rng.integers(0, 3, (k, n)).astype(np.uint8)
        negative = -rng.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
        dense = np.where(codes == 1, scales[g_idx], np.where(codes == 2, negative[g_idx], 0)).astype(np.float64)
        arrays = {"words": words.pack(codes, 2), "positive": scales, "negative": negative}
    else:
        bits = int(kind)
        codes = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
        zeros = rng.integers(0, 2**bits, (groups, n)).astype(np.uint8)
        dense = scales.astype(np.float64)[g_idx] * (codes.astype(np.float64) - zeros[g_idx])
        arrays = {"qweight": words.pack(codes, bits), "qzeros": words.pack(zeros, bits, axis=-1), "scales": scales}
    return {name: jnp.asarray(a) for name, a in arrays.items()} | {"g_idx": order}, dense


def product(kind, x, arrays, group_size, **options):
    if kind == "ternary":
        return lowbit.ternary_matmul(x, **arrays, group_size=group_size, **options)
    return lowbit.matmul(x, **arrays, bits=int(kind), group_size=group_size, **options)


def inputs(m, k, dtype, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, k)), dtype)


def error(y, x, dense):
    expected = np.asarray(x, np.float64) @ dense
    assert y.shape == expected.shape and y.dtype == x.dtype
    return np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()


def shape_of(kind, m, k, n, group_size, act_order=False):
    groups = 1 if group_size == -1 else -(-k // group_size)
    bits = 2 if kind == "ternary" else int(kind)
    return Shape(m, k, n, bits, k if groups == 1 else group_size, groups, kind == "ternary", act_order)


def on_tpu(kind, x, arrays, n, group_size):
    """The TPU kernel, interpreted, two chunks a step: its loop over chunks is unrolled, and XLA compiles for long."""
    shape = shape_of(kind, *x.shape, n, group_size)
    tile = dataclasses.replace(lowbit_tpu.tile_for(shape), chunks=2)
    if kind == "ternary":
        scales, zeros = arrays["positive"], arrays["negative"]
    else:
        scales, zeros = arrays["scales"], lowbit.unpack_zeros(arrays["qzeros"], shape.bits, n)
    packed = arrays["words" if kind == "ternary" else "qweight"]
    return lowbit_tpu.matmul(x, packed, *(a.astype(jnp.float32) for a in (scales, zeros)), shape, tile, interpret=True)


@pytest.mark.parametrize(("group_size", "act_order"), [(-1, False), (32, False), (40, False), (32, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_definition(kind, group_size, act_order):
    arrays, dense = operands(kind, 96, 40, group_size, act_order)
    x = inputs(3, 96, jnp.float32)
    assert error(product(kind, x, arrays, group_size, implementation="xla"), x, dense) < 1e-6


@pytest.mark.parametrize(("group_size", "act_order"), [(32, False), (40, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dequantising_kernel_is_the_definition(kind, group_size, act_order):
    arrays, dense = operands(kind, 96, 40, group_size, act_order)
    names = ("words", "positive", "negative") if kind == "ternary" else ("qweight", "scales", "qzeros")
    packed = [arrays[name] for name in (*names, "g_idx")]
    shape = shape_of(kind, 1, 96, 40, group_size, act_order)
    found = lowbit_gpu.dequantise(*packed, shape, jnp.float32, interpret=True)
    np.testing.assert_array_equal(found, dense.astype(np.float32))


TPU_CASES = [
    ("2", "bfloat16", 3, 544, 72, 32),
    ("3", "bfloat16", 3, 544, 72, 128),
    ("3", "float32", 3, 96, 200, -1),
    ("4", "bfloat16", 3, 288, 72, 32),
    ("4", "bfloat16", 17, 544, 72, -1),
    ("4", "float32", 3, 288, 72, 128),
    ("8", "bfloat16", 3, 160, 72, 32),
    ("ternary", "bfloat16", 3, 544, 72, 128),
    ("ternary", "float32", 3, 288, 72, 32),
]


@pytest.mark.parametrize("case", TPU_CASES, ids=lambda c: "-".join(map(str, c)))
def test_tpu_kernel_interpreted(case):
    kind, dtype, m, k, n, group_size = case
    arrays, dense = operands(kind, k, n, group_size)
    x = inputs(m, k, dtype)
    assert error(on_tpu(kind, x, arrays, n, group_size), x, dense) < BOUNDS[dtype]


@settings(max_examples=6)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([1, 2, 17]),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([-1, 16, 24, 32, 64]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_odd_shapes(kind, m, k, n, group_size, act_order, seed):
    arrays, dense = operands(kind, 32 * k, n, group_size, act_order and group_size != -1, seed)
    x = inputs(m, 32 * k, jnp.float32, seed)
    assert error(product(kind, x, arrays, group_size, implementation="gpu", interpret=True), x, dense) < 1e-5


@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
@pytest.mark.parametrize("kind", ["4", "ternary"])
def test_gradients(kind, implementation):
    arrays, dense = operands(kind, 96, 40, 32)
    x, dy = inputs(3, 96, jnp.float32), inputs(3, 40, jnp.float32, seed=2)
    options = {"implementation": implementation, "interpret": True}
    y, pull = jax.vjp(lambda x: product(kind, x, arrays, 32, **options), x)
    np.testing.assert_allclose(pull(dy)[0], np.asarray(dy, np.float64) @ dense.T, rtol=1e-4, atol=1e-4)
    assert all(leaf.size < 96 * 40 for leaf in jax.tree.leaves(pull))  # the words wait, not a dense matrix
    scale = "positive" if kind == "ternary" else "scales"

    def loss(scales, implementation, interpret):
        arrays_ = arrays | {scale: scales}
        return jnp.sum(product(kind, x, arrays_, 32, implementation=implementation, interpret=interpret) * dy)

    scales = arrays[scale].astype(jnp.float32)
    grad, expected = jax.grad(loss)(scales, implementation, True), jax.grad(loss)(scales, "xla", False)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(expected).max()) > 0


def test_leading_axes_vmap_and_jit():
    arrays, dense = operands("4", 96, 40, 32)
    x = inputs(6, 96, jnp.float32).reshape(2, 3, 96)
    f = lambda x: product("4", x, arrays, 32, implementation="gpu", interpret=True)
    expected = np.asarray(x, np.float64) @ dense
    for y in (f(x), jax.jit(f)(x), jax.vmap(f)(x)):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


# -- what is chosen ---------------------------------------------------------------------------------------------------


def test_the_choice():
    decode, prefill = shape_of("4", 1, 4096, 4096, 128), shape_of("4", 4096, 4096, 4096, 128)
    assert lowbit.platform() == "cpu" and lowbit.choose(decode, jnp.bfloat16) == "xla"
    assert lowbit.choose(decode, jnp.bfloat16, "tpu") == "tpu" and lowbit.choose(prefill, jnp.bfloat16, "tpu") == "xla"
    assert lowbit.choose(decode, jnp.bfloat16, "gpu") == lowbit.choose(prefill, jnp.bfloat16, "gpu") == "gpu"
    assert lowbit.choose(decode, jnp.bfloat16, "other") == "xla"
    assert lowbit.choose(decode, jnp.float16, "tpu") == "xla"  # TPUs have no float16
    assert lowbit.choose(shape_of("4", 1, 4096, 4096, 128, act_order=True), jnp.bfloat16, "tpu") == "xla"
    assert lowbit.choose(shape_of("4", 1, 4096, 4096, 36), jnp.bfloat16, "tpu") == "xla"
    assert lowbit.choose(shape_of("4", 0, 4096, 4096, 128), jnp.bfloat16, "gpu") == "xla"


def test_no_kernel_in_a_program_for_several_devices():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    for axis, where in ((jax.sharding.AxisType.Auto, "other"), (jax.sharding.AxisType.Manual, "gpu")):
        mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=(axis,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert lowbit.platform() == where
    other = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-40GB", num_cores=108, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=other)):
        assert lowbit.platform() == "other"


@pytest.mark.parametrize("kind", ["4", "ternary"])
def test_typed_weights_take_the_kernel_on_a_gpu_only(kind):
    arrays, dense = operands(kind, 96, 64, 32)
    if kind == "4":
        w = PackedWeight(arrays["qweight"], arrays["qzeros"], arrays["scales"], None, 4, 32)
    else:
        w = TernaryWeight(arrays["words"], arrays["positive"], arrays["negative"], None, 32)
    x = inputs(2, 96, jnp.bfloat16)
    assert "lowbit_dequantise" in aot.lower_for_cuda(lambda w, x: w.matmul(x), w, x)
    grad = jax.grad(lambda x, w: w.matmul(x).astype(jnp.float32).sum())
    assert "lowbit_dequantise" in aot.lower_for_cuda(grad, x, w)
    assert "lowbit" not in jax.jit(lambda w, x: w.matmul(x)).lower(w, x).as_text()
    np.testing.assert_allclose(w.matmul(x.astype(jnp.float32)), np.asarray(x, np.float64) @ dense, rtol=1e-4, atol=1e-4)


# -- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_kernels_lower_for_cuda(kind, dtype):
    for m, k, n, group_size, act_order in [
        (1, 4096, 4096, 128, False),
        (16, 544, 200, 32, False),
        (64, 96, 80, 40, True),
    ]:
        arrays, _ = operands(kind, k, n, group_size, act_order)
        x = jax.ShapeDtypeStruct((m, k), dtype)
        f = functools.partial(product, kind, group_size=group_size, implementation="gpu")
        text = aot.lower_for_cuda(lambda x, a, f=f: f(x, a), x, arrays)
        assert "lowbit_dequantise" in text


TPU_SNIPPET = """
import jax.numpy as jnp
from kernels.test_lowbit import KINDS, operands, product
import jax

cases = {}
for kind in KINDS:
    for m, k, n, group_size, dtype in [
        (1, 2048, 1024, 128, "bfloat16"), (256, 2048, 1024, 128, "bfloat16"), (5, 1056, 200, 32, "bfloat16"),
        (5, 544, 72, -1, "float32"),
    ]:
        arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands(kind, k, n, group_size)[0])
        f = lambda x, a, kind=kind, g=group_size: product(kind, x, a, g, implementation="tpu")
        cases[f"{kind} {m}x{k}x{n} g{group_size} {dtype}"] = (f, (jax.ShapeDtypeStruct((m, k), dtype), arrays))
"""


@pytest.mark.parametrize("topology", aot.TOPOLOGIES)
def test_the_tpu_kernel_compiles(topology):
    found = aot.compile_for_tpu(TPU_SNIPPET, topology, timeout=300)
    assert len(found) == 20 and all(case["kernels"] == 1 for case in found.values())


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"implementation": "cuda"}, "implementation='cuda'"),
        ({"x": jnp.ones((2, 64))}, "x: expected 96 inputs"),
        ({"group_size": 16}, "scales: expected"),
        ({"qzeros": jnp.ones((3, 4), jnp.int32)}, "qzeros: expected"),
        ({"g_idx": jnp.ones(4, jnp.int32)}, "g_idx: expected"),
        ({"implementation": "tpu", "g_idx": jnp.zeros(96, jnp.int32)}, "the TPU kernel"),
    ],
)
def test_errors_name_the_argument(change, message):
    arrays, _ = operands("4", 96, 40, 32)
    arguments = {"x": jnp.ones((2, 96)), "bits": 4, "group_size": 32} | arrays | change
    with pytest.raises(ValueError, match=message):
        lowbit.matmul(**arguments)


def test_a_tile_must_hold_whole_groups():
    assert lowbit_tpu.tile_for(shape_of("4", 1, 96, 40, 36)) is None
