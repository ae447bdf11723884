import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformers import losses

SUPCON = ["supcon_basic", "supcon_large_values", "supcon_repeated_labels"]


@pytest.fixture(params=SUPCON)
def supcon(request, oracles):
    return np.load(oracles / "star" / f"{request.param}.npz")


def close(actual, expected, rtol):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_supcon_equals_the_published_star_loss(supcon):
    loss = lambda f, t: losses.supcon_loss(f, jnp.array(supcon["labels"]), log_scale=t, compat="star")
    value, (grad, grad_t) = jax.value_and_grad(loss, argnums=(0, 1))(jnp.array(supcon["features"]), jnp.array(0.07))
    close(value, supcon["official_loss"], 1e-5)
    close(grad, supcon["official_grad"], 1e-4)
    assert grad_t == supcon["official_temperature_grad"] == 0.0


@pytest.mark.parametrize("block_rows", [None, 1, 5, 8])
@pytest.mark.parametrize("scale", ["14.2857", "20.0000", "100.0000"])
def test_supcon_intended_form(supcon, scale, block_rows):
    labels = jnp.array(supcon["labels"])
    temperature = {"14.2857": 0.07, "20.0000": 0.05, "100.0000": 0.01}[scale]
    loss = lambda f: losses.supcon_loss(f, labels, temperature=temperature, block_rows=block_rows)
    value, grad = jax.value_and_grad(loss)(jnp.array(supcon["features"]))
    close(value, supcon[f"intended_loss_scale_{scale}"], 1e-5)
    close(grad, supcon[f"intended_grad_scale_{scale}"], 1e-5)


def test_supcon_learnable_scale_and_its_bound(supcon):
    f, labels = jnp.array(supcon["features"]), jnp.array(supcon["labels"])
    loss = jax.value_and_grad(lambda t: losses.supcon_loss(f, labels, log_scale=t))
    value, grad = loss(jnp.log(20.0))
    close(value, supcon["intended_loss_scale_20.0000"], 1e-5)
    assert grad != 0
    value, grad = loss(jnp.array(9.0))
    close(value, supcon["intended_loss_scale_100.0000"], 1e-5)
    assert grad == 0


def test_supcon_of_linktransformer(oracles):
    d = np.load(oracles / "linktransformer" / "losses.npz")
    labels = jnp.array(d["sup_labels"])
    value, grad = jax.value_and_grad(lambda f: losses.supcon_loss(f, labels, temperature=0.07, eps=0.0))(
        jnp.array(d["sup_features"])
    )
    close(value, d["sup_loss"], 1e-5)
    close(grad, d["sup_grad"], 1e-5)


def test_supcon_anchors_without_positive():
    key = jax.random.key(0)
    f = jax.random.normal(key, (6, 4))
    lonely = jnp.array([0, 0, 1, 1, 2, 3])
    assert jnp.isnan(losses.supcon_loss(f, lonely, compat="star"))
    value, grad = jax.value_and_grad(lambda f: losses.supcon_loss(f, lonely))(f)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()
    assert jnp.abs(grad[4:]).max() > 0  # still negatives of the others
    value, grad = jax.value_and_grad(lambda f: losses.supcon_loss(f, jnp.arange(6)))(f)
    assert value == 0 and (grad == 0).all()
    np.testing.assert_array_equal(losses.has_positives(lonely), [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(losses.has_positives(jnp.array([3, 1, 3, 2, 2, 0])), [1, 0, 1, 1, 1, 0])


def test_supcon_zero_vector_has_a_finite_gradient():
    f = jnp.ones((4, 3)).at[0].set(0.0)
    for compat in (None, "star"):
        value, grad = jax.value_and_grad(lambda f: losses.supcon_loss(f, jnp.array([0, 0, 1, 1]), compat=compat))(f)  # noqa: B023
        assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_supcon_blocks_need_less_memory():
    n, width = 2048, 16
    f, labels = jnp.ones((n, width)), jnp.arange(n) // 4

    def temporary(block_rows):
        loss = lambda f: losses.supcon_loss(f, labels, block_rows=block_rows)
        return jax.jit(jax.grad(loss)).lower(f).compile().memory_analysis().temp_size_in_bytes

    assert temporary(None) > n * n * 4  # the whole matrix at least once
    assert temporary(64) < n * n * 4 / 4


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5), st.integers(2, 4))
def test_supcon_ignores_the_order_of_rows_and_the_length_of_vectors(seed, batch, views):
    rng = np.random.default_rng(seed)
    f = rng.normal(size=(batch * views, 5)).astype(np.float32)
    labels = np.repeat(np.arange(batch), views)
    value = losses.supcon_loss(jnp.array(f), jnp.array(labels))
    order = rng.permutation(len(f))
    longer = f[order] * rng.uniform(0.5, 3.0, size=(len(f), 1)).astype(np.float32)
    close(losses.supcon_loss(jnp.array(longer), jnp.array(labels[order])), value, 1e-4)


def test_info_nce_of_star(supcon):
    anchor, replica = jnp.array(supcon["infonce_anchor"]), jnp.array(supcon["infonce_replica"])
    loss, accuracy = losses.info_nce(anchor, replica, compat="star")
    close(loss, supcon["infonce_official_loss"], 1e-5)
    close(accuracy, supcon["infonce_official_accuracy"], 1e-6)
    loss, accuracy = losses.info_nce(jnp.eye(4), jnp.eye(4), log_scale=np.log(50.0))
    assert loss < 1e-6 and accuracy == 1.0


@pytest.mark.parametrize("mode", ["mixed", "one_pos", "all_neg", "all_pos"])
def test_online_contrastive_loss(mode, oracles):
    d = np.load(oracles / "linktransformer" / "losses.npz")
    labels = jnp.array(d[f"oc_{mode}_labels"])
    loss = lambda u, v: losses.online_contrastive_loss(u, v, labels)
    u, v = jnp.array(d[f"oc_{mode}_u"]), jnp.array(d[f"oc_{mode}_v"])
    value, (gu, gv) = jax.value_and_grad(loss, argnums=(0, 1))(u, v)
    close(value, d[f"oc_{mode}_loss"], 1e-5)
    close(gu, d[f"oc_{mode}_grad_u"], 1e-5)
    close(gv, d[f"oc_{mode}_grad_v"], 1e-5)


def test_cross_entropy_averages_over_kept_labels():
    logits = jnp.array([[[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], [[1.0, 5.0, 0.0], [3.0, 3.0, 3.0]]])
    labels = jnp.array([[0, -100], [1, 2]])
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    close(losses.cross_entropy(logits, labels), -(log_p[0, 0, 0] + log_p[1, 0, 1] + log_p[1, 1, 2]) / 3, 1e-6)
    grad = jax.grad(losses.cross_entropy)(logits, labels)
    assert (grad[0, 1] == 0).all()
    assert losses.cross_entropy(logits, jnp.full((2, 2), -100)) == 0
    assert losses.cross_entropy(logits.astype(jnp.bfloat16), labels).dtype == jnp.float32


def test_kl_divergence():
    rng = np.random.default_rng(0)
    t, s = rng.normal(size=(2, 3, 5)).astype(np.float32) * 3
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (t.astype(np.float64), s.astype(np.float64)))
    close(losses.kl_divergence(t, s), (p * np.log(p / q)).sum(-1), 1e-5)
    assert (losses.kl_divergence(t, t) == 0).all()
    where = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    loss = lambda s: losses.kl_divergence(t, s, where=where)
    value, grad = loss(s), jax.grad(lambda s: loss(s).sum())(jnp.array(s))
    kept = losses.kl_divergence(t[:1, where[0]], s[:1, where[0]])
    close(value[:1], kept, 1e-5)
    assert value[1] == value[2] == 0  # no class; one class
    assert jnp.isfinite(grad).all() and (jnp.where(where, 0.0, grad) == 0).all()


def test_errors_name_the_argument():
    f = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="features"):
        losses.supcon_loss(f, jnp.arange(3))
    with pytest.raises(ValueError, match="temperature"):
        losses.supcon_loss(f, jnp.arange(4), temperature=0.1, log_scale=1.0)
    with pytest.raises(ValueError, match="temperature"):
        losses.supcon_loss(f, jnp.arange(4), temperature=0.0)
    with pytest.raises(ValueError, match="temperature"):
        losses.supcon_loss(f, jnp.arange(4), temperature=0.1, compat="star")
    with pytest.raises(ValueError, match="compat"):
        losses.supcon_loss(f, jnp.arange(4), compat="moco")
    with pytest.raises(ValueError, match="block_rows"):
        losses.supcon_loss(f, jnp.arange(4), block_rows=0)
    with pytest.raises(ValueError, match="labels"):
        losses.cross_entropy(jnp.ones((2, 3)), jnp.zeros((3,), int))
    with pytest.raises(ValueError, match="temperature"):
        losses.kl_divergence(f, f, temperature=-1.0)
    with pytest.raises(ValueError, match="replicas"):
        losses.info_nce(f, f[:2])
    with pytest.raises(ValueError, match="labels"):
        losses.online_contrastive_loss(f, f, jnp.arange(3))
