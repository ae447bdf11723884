"""The transducer's loss and gradient against enumeration of all paths, finite differences and a float64 oracle."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers.kernels.transducer import columns, lattice_loss, transducer_loss


def enumerated(logits, labels, frames, length, blank):
    """−log P by walking every path: an order of length labels among frames blanks that ends with a blank."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    paths = []
    for places in itertools.combinations(range(frames - 1 + length), length):
        t, u, score = 0, 0, 0.0
        for i in range(frames - 1 + length):
            if i in places:
                score, u = score + log_p[t, u, labels[u]], u + 1
            else:
                score, t = score + log_p[t, u, blank], t + 1
        paths.append(score + log_p[t, u, blank])
    return -np.logaddexp.reduce(paths)


SAMPLES = [(1, 0), (1, 3), (4, 0), (3, 2), (5, 3), (4, 3)]  # frames and labels


def batch(blank, vocabulary=5, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((len(SAMPLES), 5, 4, vocabulary)).astype(np.float32) * 2
    labels = rng.choice([k for k in range(vocabulary) if k != blank], (len(SAMPLES), 3))
    return jnp.asarray(logits), jnp.asarray(labels), *(jnp.asarray(a) for a in np.array(SAMPLES).T)


@pytest.mark.parametrize("blank", [0, 4])
def test_equals_enumeration(blank):
    logits, labels, frames, lengths = batch(blank)
    expected = [enumerated(*x, blank) for x in zip(logits, np.asarray(labels), *np.array(SAMPLES).T, strict=True)]
    assert np.abs(transducer_loss(logits, labels, frames, lengths, blank=blank) - np.array(expected)).max() < 1e-5
    parts = columns(logits, labels[:, None], blank=blank)
    assert np.abs(lattice_loss(*parts, frames, lengths) - np.array(expected)).max() < 1e-5


def test_gradient_equals_finite_differences_of_the_enumeration():
    logits, labels, frames, lengths = batch(0)
    found = np.asarray(jax.jit(jax.grad(lambda x: transducer_loss(x, labels, frames, lengths).sum()))(logits))
    rng = np.random.default_rng(1)
    for i, (t, u) in enumerate(SAMPLES):
        direction = rng.standard_normal(logits.shape[1:])
        at = lambda h, i=i, t=t, u=u, d=direction: enumerated(
            np.asarray(logits[i], np.float64) + h * d, np.asarray(labels[i]), t, u, 0
        )
        assert abs((at(1e-4) - at(-1e-4)) / 2e-4 - (found[i] * direction).sum()) < 1e-5


def test_gradient_of_the_lattice_equals_that_of_the_logits():
    logits, labels, frames, lengths = batch(0)
    weight = jnp.arange(1.0, 7)
    whole = jax.jit(jax.grad(lambda x: (weight * transducer_loss(x, labels, frames, lengths)).sum()))(logits)
    by_parts = lambda x: (weight * lattice_loss(*columns(x, labels[:, None]), frames, lengths)).sum()
    assert np.abs(whole - jax.jit(jax.grad(by_parts))(logits)).max() < 1e-5


def test_what_lies_behind_is_not_seen():
    logits, labels, frames, lengths = batch(0)
    f = jax.jit(jax.value_and_grad(lambda x: transducer_loss(x, labels, frames, lengths).sum()))
    loss, grad = f(logits)
    behind = (np.arange(5)[:, None] >= frames[:, None, None]) | (np.arange(4) > lengths[:, None, None])
    for garbage in (np.nan, np.inf, 1e30):
        other, changed = f(jnp.where(behind[..., None], garbage, logits))
        assert other == loss and np.array_equal(changed, grad)
    assert (np.asarray(grad)[behind] == 0).all()


def test_bfloat16_and_vmap():
    logits, labels, frames, lengths = batch(0)
    f = jax.jit(functools.partial(transducer_loss, blank=0))
    exact = f(logits, labels, frames, lengths)
    low = logits.astype(jnp.bfloat16)
    assert np.abs(f(low, labels, frames, lengths) - f(low.astype(jnp.float32), labels, frames, lengths)).max() < 1e-6
    grad = jax.grad(lambda x: f(x, labels, frames, lengths).sum())(low)
    assert grad.dtype == jnp.bfloat16
    one = jax.jit(jax.vmap(lambda *x: transducer_loss(*(a[None] for a in x))[0]))(logits, labels, frames, lengths)
    assert np.abs(one - exact).max() < 1e-6


@pytest.mark.parametrize("name", ["rnnt_small", "rnnt_medium"])
def test_oracle(oracles, shared, name):
    folder = oracles / "transducer" if name == "rnnt_small" else shared / "oracles" / "arabic_htr"
    with np.load(folder / f"{name}.npz") as z:
        logits, labels, frames, lengths = (z["in/" + n] for n in ("logits", "labels", "logit_lengths", "label_lengths"))
        losses, grads, blank = z["out/loss"], z["out/grad_logits_of_sum"], json.loads(str(z["options"]))["blank"]
    f = lambda x: transducer_loss(x, jnp.asarray(labels), jnp.asarray(frames), jnp.asarray(lengths), blank=blank)
    (_, found), grad = jax.jit(jax.value_and_grad(lambda x: (f(x).sum(), f(x)), has_aux=True))(jnp.asarray(logits))
    assert np.abs(found / losses - 1).max() < 1e-5
    assert np.abs(grad - grads).max() < (1e-5 if name == "rnnt_small" else 2e-5)


def test_what_does_not_fit_is_refused():
    logits, labels, frames, lengths = batch(0)
    for changed, message in (
        ({"labels": labels[:, :2]}, "labels"),
        ({"blank": 5}, "blank: expected an id in 0..4"),
        ({"frames": frames * 0}, "frames: expected numbers in 1..5"),
        ({"frames": frames[:2]}, "frames: expected"),
        ({"lengths": lengths + 3}, "lengths: expected numbers in 0..3"),
    ):
        with pytest.raises(ValueError, match=message):
            transducer_loss(**({"logits": logits, "labels": labels, "frames": frames, "lengths": lengths} | changed))
    with pytest.raises(ValueError, match="blank and label"):
        lattice_loss(logits[..., 0], logits[:, :, :3, 0], frames, lengths)
