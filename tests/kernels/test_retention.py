"""The forms of retention, and its kernels in the interpreter, agree in values and gradients; an independent oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import aot

from jaxformers.kernels import retention_gpu
from jaxformers.kernels.retention import choose, rebase, retention, step, xpos

KERNELS = {
    "pallas_gpu": {"implementation": "pallas_gpu", "chunk": 32, "tiles": retention_gpu.Tiles(16), "interpret": True},
    "pallas_tpu": {"implementation": "pallas_tpu", "chunk": 128, "interpret": True},
}


def decays(heads):
    return jnp.log(1 - jnp.exp(jnp.linspace(np.log(1 / 32), np.log(1 / 512), heads)))


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def everything(form, length, *, heads=2, key=8, value=12, turned=True, irregular=False, padded=False, stated=True):
    """Outputs, state and gradients of a sum that weighs both, in one form."""
    q, k, v = draw((2, length, heads, key), 0), draw((2, length, heads, key), 1), draw((2, length, heads, value), 2)
    weight, other = draw(v.shape, 3), draw((2, heads, key, value), 4)
    gaps = np.random.default_rng(5).choice([0, 0, 1, 3, 500], (2, length))
    times = jnp.asarray(np.cumsum(gaps, 1), jnp.float32) if irregular else None
    settings = {"times": times, "positions": xpos(heads * key, heads) if turned else None}
    if padded:
        settings["keep"] = jnp.arange(length)[None] < jnp.array([[length], [length // 2]])
    if stated and irregular:
        settings["state_time"] = times[:, 0] - 2

    def loss(q, k, v, log_decay, state):
        out, last = retention(q, k, v, log_decay, state=state if stated else None, **settings, **form)
        return (out * weight).sum() + (last * other).sum(), (out, last)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
    grads, found = grad(q, k, v, decays(heads), draw((2, heads, key, value), 6))
    return (*found, *grads)


def assert_same(found, expected, tolerance=2e-5):
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


CASES = {
    "plain": {"turned": False, "stated": False},
    "xpos, state, padding": {"padded": True},
    "irregular": {"irregular": True, "padded": True},
}


@pytest.mark.parametrize("case", CASES)
def test_forms_agree(case):
    expected = everything({"form": "parallel"}, 70, **CASES[case])
    assert_same(everything({"form": "recurrent"}, 70, **CASES[case]), expected)
    for chunk in (16, 128):  # ragged last chunks, and one longer than the sequence
        assert_same(everything({"chunk": chunk, "implementation": "xla"}, 70, **CASES[case]), expected)


@pytest.mark.parametrize("how", KERNELS)
@pytest.mark.parametrize("case", ["xpos, state, padding", "irregular"])
def test_kernels_agree(how, case):
    length = 70 if how == "pallas_gpu" else 200
    expected = everything({"chunk": KERNELS[how]["chunk"], "implementation": "xla"}, length, **CASES[case])
    assert_same(everything(KERNELS[how], length, **CASES[case]), expected, 1e-5)


def test_more_chunks_than_are_loaded_together():
    length = 16 * (retention_gpu.AHEAD + 1) + 3
    gpu = KERNELS["pallas_gpu"] | {"chunk": 16}
    assert_same(everything(gpu, length), everything({"chunk": 16, "implementation": "xla"}, length), 2e-5)


def test_gradients_of_times():
    q, k, v, weight = (draw((2, 70, 2, 7), i) for i in range(4))
    times = jnp.cumsum(jnp.abs(draw((2, 71), 4)) * 9, 1)

    def loss(times, form):
        state = draw((2, 2, 7, 7), 5)
        settings = {"times": times[:, 1:], "state_time": times[:, 0], "state": state}
        out, last = retention(q, k, v, decays(2), **settings, **form)
        return (out * weight).sum() + (last * state).sum()

    expected = jax.grad(loss)(times, {"form": "parallel"})
    assert_same([jax.grad(loss)(times, KERNELS["pallas_gpu"])], [expected])


@settings(max_examples=3)
@given(
    how=st.sampled_from(sorted(KERNELS)),
    length=st.integers(1, 90),
    heads=st.integers(1, 3),
    key=st.sampled_from([2, 6, 20, 50]),
    value=st.sampled_from([1, 7, 50]),
)
def test_odd_shapes(how, length, heads, key, value):
    q, k, v = draw((1, length, heads, key), 0), draw((1, length, heads, key), 1), draw((1, length, heads, value), 2)
    found = retention(q, k, v, decays(heads), **KERNELS[how])
    assert_same(found, retention(q, k, v, decays(heads), form="parallel"))


def test_bfloat16():
    q, k, v = (draw((1, 100, 2, 64), i).astype(jnp.bfloat16) for i in range(3))
    exact, state = retention(*(a.astype(jnp.float32) for a in (q, k, v)), decays(2), form="parallel")
    for form in ({"implementation": "xla"}, *KERNELS.values()):
        out, last = retention(q, k, v, decays(2), **form)
        assert out.dtype == jnp.bfloat16 and last.dtype == jnp.float32
        assert_same((out.astype(jnp.float32), last), (exact, state), 1.5e-2)


def test_oracle(oracles):
    with np.load(oracles / "retention" / "irregular.npz") as z:
        a = {n: jnp.asarray(z[n], jnp.bool_ if n == "keep" else jnp.float32) for n in z.files if n != "options"}
    q, k, v = (a[n].reshape(*a[n].shape[:2], 4, -1) for n in ("q", "k", "v"))
    positions, length = xpos(24, 4), q.shape[1]
    settings = {"times": a["times"], "keep": a["keep"], "positions": positions}
    for form in ({"form": "parallel"}, {"form": "recurrent"}, {"chunk": 16}, KERNELS["pallas_gpu"]):
        out, state = retention(q, k, v, jnp.log(a["gamma"]), **settings, **form)
        assert np.abs(out.swapaxes(1, 2) - a["out"]).max() < 1e-5
        assert np.abs(rebase(state, positions, 1 - length) - a["state_chunk8"]).max() < 1e-5


def test_streaming_continues_where_a_chunk_ended():
    q, k, v = (draw((2, 300, 2, 8), i) for i in range(3))
    positions, ln = xpos(16, 2), decays(2)
    whole, last = retention(q, k, v, ln, positions=positions, chunk=64)
    first, state = retention(q[:, :100], k[:, :100], v[:, :100], ln, positions=positions, chunk=64)
    second, state = retention(q[:, 100:299], k[:, 100:299], v[:, 100:299], ln, positions=positions, state=state)
    one = functools.partial(step, positions=positions)
    third, state = one(q[:, 299], k[:, 299], v[:, 299], state, ln, jnp.ones(2))
    assert_same((jnp.concatenate([first, second, third[:, None]], 1), state), (whole, last))


def test_long_sequences_stay_finite_and_causal():
    """xPos' scales reach 10^17 at 16 000 steps when positions are absolute; here they never leave the chunk."""
    length = 16_000
    q, k, v = (draw((1, length, 1, 4), i) for i in range(3))
    f = jax.jit(lambda *a: retention(*a, decays(1), positions=xpos(4, 1))[0])
    out = f(q, k, v)
    tail = retention(q[:, -2000:], k[:, -2000:], v[:, -2000:], decays(1), positions=xpos(4, 1))[0]
    assert np.isfinite(out).all()
    assert_same([out[:, -100:]], [tail[:, -100:]])  # what lies 1900 steps back has decayed below rounding
    changed = f(q, k.at[:, 8000].add(1.0), v)
    assert np.array_equal(out[:, :8000], changed[:, :8000]) and not np.array_equal(out[:, 8000], changed[:, 8000])


def test_lowers_for_cuda():
    for dtype, key, value in ((jnp.bfloat16, 50, 100), (jnp.float32, 64, 128)):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        run = functools.partial(retention, implementation="pallas_gpu", positions=xpos(4 * key, 4))
        f = lambda *a, run=run: run(*a, decays(4))[0].sum()
        args = shape((2, 300, 4, key)), shape((2, 300, 4, key)), shape((2, 300, 4, value))
        text = aot.lower_for_cuda(jax.grad(f, argnums=(0, 1, 2)), *args)
        assert all(f"retention_{n}_kernel" in text for n in ("sums", "recurrence", "backward"))


def test_the_choice(monkeypatch):
    from jaxformers.kernels import retention as module

    chosen = {}
    for where in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(module, "platform", lambda where=where: where)
        monkeypatch.setattr(module, "partitioned", lambda: False)
        chosen[where] = [choose(4096, 128, 64), choose(4096, 64, 64), choose(100, 128, 64), choose(4096, 128, 256)]
        chosen[where] += [choose(4096, 128, size, jnp.float32) for size in (64, 128)]
    assert chosen["cpu"] == 6 * ["xla"]
    assert chosen["gpu"] == ["pallas_gpu", "pallas_gpu", "xla", "xla", "pallas_gpu", "xla"]
    assert chosen["tpu"] == ["pallas_tpu", "xla", "xla", "pallas_tpu", "pallas_tpu", "pallas_tpu"]


def test_what_does_not_fit_is_refused():
    q, ln = jnp.zeros((2, 5, 4, 6)), jnp.zeros(4)
    for changed, message in (
        ({"k": q[:, :4]}, "expected k like q"),
        ({"log_decay": ln[:3]}, "log_decay"),
        ({"times": jnp.zeros((2, 4))}, "times: expected"),
        ({"keep": jnp.zeros((1, 5))}, "keep: expected"),
        ({"positions": xpos(24, 2)}, "positions: made for"),
        ({"state": jnp.zeros((2, 4, 6, 5))}, "state: expected"),
        ({"state": jnp.zeros((2, 4, 6, 6)), "times": jnp.zeros((2, 5))}, "state_time"),
        ({"chunk": 100}, "power of two"),
        ({"form": "linear"}, "form: expected"),
        ({"implementation": "triton"}, "implementation: expected"),
        ({"implementation": "pallas_tpu", "chunk": 64, "q": jnp.zeros((2, 100, 4, 6))}, "multiple of 128"),
    ):
        args = {"q": q, "log_decay": ln} | changed
        args = {"k": args["q"], "v": args["q"]} | args
        with pytest.raises(ValueError, match=message):
            retention(**args)
    with pytest.raises(ValueError, match="width"):
        xpos(10, 4)
