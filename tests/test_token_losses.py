"""Losses over chunks of a vocabulary: the published numbers, equality with the whole, and what is never held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import losses
from jaxformers.token_losses import by_chunks, dpo_loss, next_labels, token_terms

SAME = lambda h: h  # logits in place of hidden states


@pytest.fixture(scope="module")
def oracle(oracles):
    with np.load(oracles / "x_ecomla" / "rank_kl_dpo.npz") as z:
        return {name: z[name].astype(np.float32) for name in z.files if z[name].dtype == np.float64}


@pytest.mark.parametrize("chunk", [None, 1, 2, 5])
def test_kl_and_its_gradient_are_the_official_ones(oracle, chunk):
    student, teacher = (jnp.asarray(oracle[f"{name}_logits"]) for name in ("student", "teacher"))
    sum_kl = lambda s, t: jnp.sum(token_terms(s, SAME, teacher=t, teacher_head=SAME, chunk=chunk)["kl"])
    value, (grad, none) = jax.jit(jax.value_and_grad(sum_kl, argnums=(0, 1)))(student, teacher)
    np.testing.assert_allclose(value / len(student), oracle["kl_batchmean_official"], rtol=1e-5)
    np.testing.assert_allclose(value / student[..., 0].size, oracle["kl_mean_per_token"], rtol=1e-5)
    np.testing.assert_allclose(grad / len(student), oracle["kl_grad_batchmean"], atol=1e-5)
    assert not np.any(none)


def test_dpo_is_the_official_loss(oracle):
    sides = [oracle[f"dpo_{who}_{side}"] for who in ("policy", "ref") for side in ("chosen", "rejected")]
    np.testing.assert_allclose(dpo_loss(*sides, beta=0.01), oracle["dpo_loss_beta001"], rtol=1e-5)
    np.testing.assert_allclose(dpo_loss(*sides, beta=0.1), oracle["dpo_loss_beta01"], rtol=1e-5)
    grads = jax.grad(lambda *sides: dpo_loss(*sides, beta=0.1).sum(), argnums=(0, 1, 2, 3))(*map(jnp.asarray, sides))
    assert (grads[0] < 0).all() and (grads[1] > 0).all() and not np.any(grads[2]) and not np.any(grads[3])
    with pytest.raises(ValueError, match="beta: must be > 0, got 0"):
        dpo_loss(*sides, beta=0)


def whole(h, t, w, v, labels, temperature):
    logits, other = h @ w, t @ v
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    nll = jnp.where(labels < 0, 0, jax.nn.logsumexp(logits, -1) - picked)
    return nll, temperature**2 * losses.kl_divergence(other, logits, temperature=temperature)


@pytest.mark.parametrize(("length", "chunk"), [(7, 3), (8, 4), (5, 9)])
def test_pieces_equal_the_whole_with_gradients_for_both_sides_of_the_head(length, chunk):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    h, t, w, v = draw(0, 2, length, 6), draw(1, 2, length, 4), draw(2, 6, 11), draw(3, 4, 11)
    real = np.arange(length)[None] < np.array([[3], [length]])
    labels = next_labels(np.arange(2 * length).reshape(2, length) % 11, real)

    def pieces(h, w):
        found = token_terms(
            h, lambda x: x @ w, labels=labels, teacher=t, teacher_head=lambda x: x @ v, temperature=2.0, chunk=chunk
        )
        return found["nll"], found["kl"]

    weigh = np.cos(np.arange(2.0 * length)).reshape(2, length)  # every position counts differently

    def both(f):
        weighed = lambda h, w: (sum(jnp.sum(x * weigh) for x in f(h, w)), f(h, w))
        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))(h, w)

    found, expected = both(pieces), both(lambda h, w: whole(h, t, w, v, labels, 2.0))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def sizes(jaxpr):
    """The number of elements of everything that is computed, in the bodies of loops too."""
    for eqn in jaxpr.eqns:
        for v in eqn.outvars:
            yield int(np.prod(v.aval.shape))
        for part in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_logits_are_held_forward_or_backward():
    batch, length, vocab, chunk = 2, 64, 500, 8
    h, t = jnp.ones((batch, length, 6)), jnp.ones((batch, length, 4))
    w, v = jnp.ones((6, vocab)), jnp.ones((4, vocab))

    def loss(h, w, chunk):
        ids = jnp.zeros((batch, length), int)
        head, teacher_head = (lambda x: x @ w), (lambda x: x @ v)
        found = token_terms(h, head, labels=ids, teacher=t, teacher_head=teacher_head, chunk=chunk)
        return sum(x.sum() for x in found.values())

    gradient = jax.grad(loss, argnums=(0, 1))
    for f in (loss, gradient):
        largest = lambda chunk, f=f: max(sizes(jax.make_jaxpr(lambda h, w: f(h, w, chunk))(h, w).jaxpr))
        assert largest(chunk) <= max(batch * chunk * vocab, 6 * vocab)
        assert largest(length) >= batch * length * vocab  # the test sees logits where there are some
    memory = lambda chunk: (
        jax.jit(gradient, static_argnums=2).lower(h, w, chunk).compile().memory_analysis().temp_size_in_bytes
    )
    full = 4 * batch * length * vocab
    assert memory(chunk) < full < memory(length)


def test_next_labels_skip_padding_on_either_side():
    ids = jnp.array([[5, 6, 7, 0], [0, 5, 6, 7]])
    found = next_labels(ids, jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]]))
    assert found.tolist() == [[6, 7, -100, -100], [-100, 6, 7, -100]]
    assert next_labels(ids).tolist() == [[6, 7, 0, -100], [5, 6, 7, -100]]


def test_errors():
    h = jnp.ones((1, 2, 3))
    with pytest.raises(ValueError, match="labels, teacher: give at least one"):
        token_terms(h, SAME)
    with pytest.raises(ValueError, match="teacher, teacher_head: they go together"):
        token_terms(h, SAME, teacher=h)
    with pytest.raises(ValueError, match="its vocabulary has 4 entries, the student's 3"):
        token_terms(h, SAME, teacher=jnp.ones((1, 2, 4)), teacher_head=SAME)
    with pytest.raises(ValueError, match="temperature: must be > 0"):
        token_terms(h, SAME, teacher=h, teacher_head=SAME, temperature=0)
    with pytest.raises(ValueError, match="chunk: expected 1 or more"):
        by_chunks(SAME, h, 0)
