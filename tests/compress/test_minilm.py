import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers.compress import minilm
from jaxformers.compress.minilm import MiniLMConfig, attention_distillation, relation_distillation, v1, v2


def close(actual, expected, rtol):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def merge_heads(x):
    """(batch, heads, length, size) -> (batch, length, heads * size)"""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


@pytest.fixture
def parts(oracles):
    d = np.load(oracles / "minilm" / "v1_components.npz")
    return {k: jnp.array(d[k]) for k in d.files if d[k].ndim and d[k].dtype != np.float64} | {
        k: d[k] for k in d.files if d[k].dtype == np.float64
    }


@jax.jit
def v1_loss(q_s, k_s, v_s, p):
    at = attention_distillation(p["q_t"], p["k_t"], q_s, k_s, p["mask"])
    vr = attention_distillation(p["v_t"], p["v_t"], v_s, v_s, p["mask"])
    return at + vr, (at, vr)


def test_v1_values_and_gradients(parts):
    inputs = {k: v for k, v in parts.items() if k[:4] not in ("loss", "grad")}
    student = [parts[k] for k in ("q_s", "k_s", "v_s")]
    (loss, (at, vr)), grads = jax.value_and_grad(v1_loss, argnums=(0, 1, 2), has_aux=True)(*student, inputs)
    close(loss, parts["loss"], 1e-5)
    close(at, parts["loss_at"], 1e-5)
    close(vr, parts["loss_vr"], 1e-5)
    for name, grad in zip(("q_s", "k_s", "v_s"), grads, strict=True):
        close(grad, parts[f"grad_{name}"], 1e-4)


def test_v1_is_the_special_case_of_relation_heads(parts):
    at = relation_distillation(*(merge_heads(parts[k]) for k in ("q_t", "k_t", "q_s", "k_s")), 4, parts["mask"])
    close(at, parts["loss_at"], 1e-5)


def test_an_example_without_real_tokens_adds_zero_and_counts(parts):
    x = [jnp.concatenate([parts[k], parts[k][:1] * 3]) for k in ("q_t", "k_t", "q_s", "k_s")]
    mask = jnp.concatenate([parts["mask"], jnp.zeros((1, 10), int)])
    loss, grads = jax.value_and_grad(lambda q: attention_distillation(x[0], x[1], q, x[3], mask))(x[2])
    close(loss, parts["loss_at"] * 3 / 4, 1e-5)
    assert jnp.isfinite(grads).all() and (grads[3] == 0).all()


def test_padding_is_invisible(parts):
    q_t, k_t, q_s, k_s = (parts[k] for k in ("q_t", "k_t", "q_s", "k_s"))
    pad = (parts["mask"] == 0)[:, None, :, None]
    noisy = [jnp.where(pad, 1e4, x) for x in (q_t, k_t, q_s, k_s)]
    assert attention_distillation(*noisy, parts["mask"]) == attention_distillation(q_t, k_t, q_s, k_s, parts["mask"])
    cut = lambda i, n: (x[i : i + 1, :, :n] for x in (q_t, k_t, q_s, k_s))
    alone = [attention_distillation(*cut(i, n)) for i, n in enumerate((10, 7, 3))]
    close(np.mean(alone), parts["loss_at"], 1e-5)


@settings(max_examples=10)
@given(st.integers(0, 100), st.booleans())
def test_invariants(seed, causal):
    keys = jax.random.split(jax.random.key(seed), 5)
    x_t, y_t = (jax.random.normal(k, (2, 6, 8)) for k in keys[:2])
    x_s, y_s = (jax.random.normal(k, (2, 6, 4)) for k in keys[2:4])
    mask = jnp.array([[1] * 6, [1] * 4 + [0] * 2])
    loss = relation_distillation(x_t, y_t, x_s, y_s, 2, mask, causal=causal)
    assert loss > 0
    assert relation_distillation(x_t, y_t, x_t, y_t, 2, mask, causal=causal) == 0
    swapped = relation_distillation(*(x[::-1] for x in (x_t, y_t, x_s, y_s)), 2, mask[::-1], causal=causal)
    close(swapped, loss, 1e-5)
    rotation = jnp.linalg.qr(jax.random.normal(keys[4], (2, 2, 2)))[0]  # one per head
    turned = merge_heads(jnp.einsum("bhld,hde->bhle", minilm._split(x_s, 2), rotation))
    close(
        relation_distillation(x_t, x_t, turned, turned, 2, mask, causal=causal),
        relation_distillation(x_t, x_t, x_s, x_s, 2, mask, causal=causal),
        1e-4,
    )


def test_causal_mask_hides_later_tokens():
    rng = np.random.default_rng(0)
    x_t, y_t, x_s, y_s = rng.normal(size=(4, 1, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 0]])

    def row(x, y, t):  # float64 softmax over the tokens up to t
        s = np.exp(x[0, t].astype(np.float64) @ y[0, : t + 1].T.astype(np.float64) / 2)
        return s / s.sum()

    kl = [np.sum(row(x_t, y_t, t) * np.log(row(x_t, y_t, t) / row(x_s, y_s, t))) for t in range(4)]
    close(relation_distillation(x_t, y_t, x_s, y_s, 1, mask, causal=True), np.mean(kl), 1e-5)


def test_teacher_gets_no_gradient(parts):
    grads = jax.grad(lambda q, k: attention_distillation(q, k, parts["q_s"], parts["k_s"], parts["mask"]), (0, 1))(
        parts["q_t"], parts["k_t"]
    )
    assert all((g == 0).all() for g in grads)


def test_bfloat16_inputs_are_compared_in_float32(parts):
    half = [parts[k].astype(jnp.bfloat16) for k in ("q_t", "k_t", "q_s", "k_s")]
    loss = attention_distillation(*half, parts["mask"])
    assert loss.dtype == jnp.float32
    close(loss, attention_distillation(*(x.astype(jnp.float32) for x in half), parts["mask"]), 1e-6)


def test_configs():
    assert v1() == MiniLMConfig()
    assert v1(value=0).relations == (("QK", 1.0),)
    assert v2(relation_heads=12, teacher_layer=21).relations == (("QQ", 1 / 3), ("KK", 1 / 3), ("VV", 1 / 3))
    assert v2(relations=(("QK", 1.0),)).relations == (("QK", 1.0),)
    for bad, match in [
        ({"relations": (("QX", 1.0),)}, "two of Q, K, V"),
        ({"relations": (("QK", -1.0),)}, "weight of QK"),
        ({"relations": ()}, "at least one pair"),
        ({"relations": (("VV", 1.0), ("VV", 1.0))}, "each once"),
        ({"relation_heads": 0}, "relation_heads"),
    ]:
        with pytest.raises(ValueError, match=match):
            MiniLMConfig(**bad)


def test_errors_of_the_losses():
    x = jnp.ones((2, 12, 5, 4))
    with pytest.raises(ValueError, match="equal head counts: teacher 12, student 8; use relation heads"):
        attention_distillation(x, x, x[:, :8], x[:, :8])
    with pytest.raises(ValueError, match="q_s: batch and length"):
        attention_distillation(x, x, x[:, :, :3], x[:, :, :3])
    with pytest.raises(ValueError, match="k_s"):
        attention_distillation(x, x, x, x[..., :2])
    with pytest.raises(ValueError, match="mask"):
        attention_distillation(x, x, x, x, jnp.ones((2, 4)))
    y = jnp.ones((2, 5, 12))
    with pytest.raises(ValueError, match="5 relation heads do not divide the width 12"):
        relation_distillation(y, y, y, y, 5)
