"""Teacher Intervention's method against the authors' code: forward, taps, losses, gradients, trajectory."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import paths
from jaxformers.compress import teacher_intervention as ti
from jaxformers.compress.teacher_intervention_qat import PAPER, _Marked
from jaxformers.models import bert
from jaxformers.train import TrainConfig, fit
from jaxformers.weights import FakeQuant

sys.path.insert(0, str(Path(__file__).parent))
import ti_pair  # noqa: E402

TAPS = {"scores": "attention.scores", "probs": "attention.probs", "context": "attention.context",
        "attn_out_ln": "mlp.up.input", "attn_dense": "attention.out.output"}  # fmt: skip


@pytest.fixture(scope="module")
def pair(oracles):
    return ti_pair.load(oracles)


@pytest.fixture(scope="module")
def passes(pair):
    """{mode: (loss, terms, logits, gradients by Hugging Face's names)}"""
    _, teacher, student, batch = pair
    forward = ti.forward_pass(teacher, student, ti.TIConfig(), {})
    own, teacher_params = jf.functional(student)[1], jf.functional(teacher)[1]

    @jax.jit
    def run(own, batch):
        def loss(own):
            loss, terms, z = forward({"student": own, "teacher": teacher_params}, batch, None)
            return loss, (terms, z)

        return jax.value_and_grad(loss, has_aux=True)(own)

    found = {}
    for mode in ti.MODES:
        (loss, (terms, z)), grads = run(own, marked(batch, mode))
        found[mode] = loss, terms, z, ti_pair.by_name(student, grads)
    return found


def marked(batch, mode):
    return batch if mode == "none" else {**batch, ti.MARK + mode: np.zeros(len(batch["input_ids"]), bool)}


def test_the_teachers_taps(pair):
    z, teacher, _, batch = pair
    apply, params = jf.functional(teacher)
    sites = [f"layers.*.{site}" for site in TAPS.values()]
    out, seen = jax.jit(jf.reap(apply, ["embeddings", "layers.*.output", *sites]))(params, batch)
    np.testing.assert_allclose(out.logits, z["teacher_logits"], rtol=1e-5, atol=1e-5)
    real = batch["attention_mask"][:, None, None, :] == 1
    for i in range(2):
        np.testing.assert_allclose(seen[f"layers.{i}.output"], z[f"teacher_tap.rep_{i + 1}"], atol=1e-5)
        for tap, site in TAPS.items():
            x, expected = seen[f"layers.{i}.{site}"], z[f"teacher_tap.{tap}_{i}"]
            if tap == "context":
                x = x.swapaxes(1, 2)
            if tap == "scores":
                x, expected = np.where(real, x, 0), np.where(real, expected, 0)
            np.testing.assert_allclose(x, expected, atol=1e-5)
    np.testing.assert_allclose(seen["embeddings"], z["teacher_tap.rep_0"], atol=1e-5)


@pytest.mark.parametrize("mode", ti.MODES)
def test_losses_and_gradients(pair, passes, mode):
    z, (loss, terms, logits, grads) = pair[0], passes[mode]
    np.testing.assert_allclose(logits, z[f"{mode}.logits"], atol=1e-5)
    np.testing.assert_allclose(loss, z[f"{mode}.loss"], rtol=1e-5)
    for term in ("pred", "rep", "out", "score"):
        np.testing.assert_allclose(terms[term], z[f"{mode}.loss_{term}"], rtol=1e-5)
    assert int(terms["mode"]) == ti.MODES.index(mode)
    names = [name for name in z.files if name.startswith(f"{mode}.grad.")]
    assert len(names) >= 12
    for name in names:
        scale = np.abs(z[name]).max()
        np.testing.assert_allclose(grads[name.removeprefix(f"{mode}.grad.")], z[name], atol=1e-4 * scale)
    # what the authors' code gives no gradient at all is exactly zero here, and nothing else is
    zero = sorted(name for name, g in grads.items() if not np.any(g))
    assert zero == sorted(json.loads(str(z[f"{mode}.params_without_gradient"])))


@pytest.mark.parametrize("mode", ti.MODES)
def test_the_students_own_signals(pair, mode):
    """They are computed and read before the teacher's take their place."""
    z, teacher, student, batch = pair
    lent = () if mode == "none" else (f"layers.*.{ti.SITE[mode]}",)
    teach, learn = jf.functional(teacher), jf.functional(student)
    sites = ["layers.1.attention.scores", "layers.0.attention.context", "layers.0.attention.out.output",
             "layers.1.output"]  # fmt: skip

    @jax.jit
    def run(teacher_params, params, batch):
        seen = jf.reap(teach[0], lent)(teacher_params, batch)[1] if lent else {}
        return ti.intervene(jf.reap(learn[0], sites), mode, seen)(params, batch)[1]

    seen = run(teach[1], learn[1], batch)
    real = batch["attention_mask"][:, None, None, :] == 1
    scores = [np.where(real, x, 0) for x in (seen[sites[0]], z[f"{mode}.scores_last"])]
    np.testing.assert_allclose(*scores, atol=1e-5)
    np.testing.assert_allclose(seen[sites[1]].swapaxes(1, 2), z[f"{mode}.context_0"], atol=1e-5)
    np.testing.assert_allclose(seen[sites[2]], z[f"{mode}.attn_dense_0"], atol=1e-5)
    np.testing.assert_allclose(seen[sites[3]], z[f"{mode}.rep_last"], atol=1e-5)


def test_a_trajectory_of_bert_adam(pair):
    """12 steps of the gradual schedule: unreached tensors are passed over, and their schedule waits for them."""
    z, teacher, student, batch = pair
    modes = ti.mode_schedule("gradual", 12, jax.random.key(0))
    assert list(modes) == json.loads(str(z["traj.modes"]))
    objective, params, freeze = ti.ti_objective(teacher, student)
    optim = PAPER.__class__(name="bert_adam", learning_rate=2e-3, warmup=0.1, weight_decay=0.01)
    train = TrainConfig(steps=12, optim=optim, log_every=1, freeze=freeze, progress=False)
    done = fit(objective, params, _Marked([batch], modes), train, key=jax.random.key(0))
    losses = [record["loss"] for record in done.history if record["kind"] == "train"]
    np.testing.assert_allclose(losses, z["traj.loss"], rtol=1e-4)
    assert [int(r["mode"]) for r in done.history if r["kind"] == "train"] == [ti.MODES.index(m) for m in modes]
    final = ti_pair.by_name(student, done.params["student"])
    names = [name for name in z.files if name.startswith("traj.final.")]
    assert len(names) == 4
    for name in names:
        np.testing.assert_allclose(final[name.removeprefix("traj.final.")], z[name], atol=2e-5)


def test_errors_stay_in_their_layer(pair):
    """Layer 0 learns nothing from layer 1's scores under an intervention, and does without."""
    _, teacher, student, batch = pair
    teach, learn = jf.functional(teacher), jf.functional(student)

    def loss(params, mode):
        lent = () if mode == "none" else (f"layers.*.{ti.SITE[mode]}",)
        _, known = jf.reap(teach[0], ["layers.*.attention.scores", *lent])(teach[1], batch)
        own = jf.reap(learn[0], "layers.1.attention.scores")
        _, seen = ti.intervene(own, mode, {k: v for k, v in known.items() if "scores" not in k})(params, batch)
        return jnp.square(seen["layers.1.attention.scores"] - known["layers.1.attention.scores"]).mean()

    for mode in ti.MODES:
        grads = paths.flatten(jax.jit(jax.grad(loss), static_argnums=1)(learn[1], mode))
        below = [g for path, g in grads.items() if path.startswith(("layers.0.", "embeddings."))]
        assert any(np.any(x) for g in below for x in jax.tree.leaves(g)) == (mode == "none"), mode
        query = grads["layers.1.attention.query.kernel"]
        assert isinstance(query, FakeQuant) and np.any(query.base)


def test_stacked_layers_do_the_same(pair, passes):
    _, teacher, student, batch = pair
    teacher_params = jf.functional(teacher)[1]
    run = ti.forward_pass(teacher, student, ti.TIConfig(), {"scan_layers": True, "remat": "full"})
    own = jf.functional(student, scan_layers=True, remat="full")[1]
    loss = lambda own: run({"student": own, "teacher": teacher_params}, marked(batch, "context"), None)[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(own)
    np.testing.assert_allclose(value, passes["context"][0], rtol=1e-6)
    value = grads["layers"]["*"]["attention"]
    assert not np.any(value["value"]["kernel"].base) and np.any(value["query"]["kernel"].base[0])
    expected = passes["context"][3]["bert.encoder.layer.1.attention.self.query.weight"].T
    np.testing.assert_allclose(value["query"]["kernel"].base[1], expected, atol=1e-5)


def test_schedules():
    key = jax.random.key(0)
    gradual = ti.mode_schedule("gradual", 60, key)
    assert [gradual.count(m) for m in ("output", "context", "map")] == [10, 10, 40]
    assert gradual[9:11] == ("output", "context") and gradual[19:21] == ("context", "map")
    inverted = ti.mode_schedule("inverted", 60, key)
    assert inverted[19:21] == ("map", "context") and inverted[39:41] == ("context", "output")
    chance = ti.mode_schedule("stochastic", 300, key)
    assert all(70 < chance.count(m) < 130 for m in ("map", "context", "output")) and "none" not in chance
    assert chance == ti.mode_schedule("stochastic", 300, key) != ti.mode_schedule("stochastic", 300, jax.random.key(1))
    assert ti.mode_schedule("map", 3, key) == ("map",) * 3 and ti.mode_schedule("none", 3, key) == ()


def test_terms_can_be_left_out(pair, passes):
    _, teacher, student, batch = pair
    params = {"student": jf.functional(student)[1], "teacher": jf.functional(teacher)[1]}
    weigh = ti.TIConfig(pred=0, rep=2.0, out=0, score=0, truth=0.5)
    run = jax.jit(ti.forward_pass(teacher, student, weigh, {}))
    loss, terms, _ = run(params, {**batch, "labels": np.array([0, 1, 2])}, None)
    known, z = passes["none"][1], passes["none"][2]
    truth = -jax.nn.log_softmax(z)[np.arange(3), np.arange(3)].mean()
    np.testing.assert_allclose(loss, 2 * known["rep"] + 0.5 * truth, rtol=1e-5)
    assert "score" not in terms and "out" not in terms


def test_bad_input(pair):
    _, teacher, student, batch = pair
    for options, match in (
        ({"intervention": "map+context"}, "exactly one of none, map"),
        ({"intervention": ("map", "output")}, "two at once are undefined"),
        ({"step1": 0}, "step1: expected 1"),
        ({"rep": -1.0}, "rep: a loss's weight"),
        ({"pred": 0, "rep": 0, "out": 0, "score": 0}, "at least one loss"),
    ):
        with pytest.raises(ValueError, match=match):
            ti.TIConfig(**options)
    with pytest.raises(ValueError, match="only one intervention may be on"):
        ti.mode_of({**marked(batch, "map"), **marked(batch, "output")})
    other = jf.init(bert.Config(60, 24, 2, 2, 40, num_labels=3), head="sequence_classification", key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"intervention needs equal shapes.*teacher \(2, 2, 24, 3\), student \(2, 3,"):
        ti.check_models(other, student)
    with pytest.raises(ValueError, match="classification or regression head"):
        ti.check_models(jf.init(bert.Config(60, 24, 2, 3, 40), key=jax.random.key(0)), student)
    run = ti.forward_pass(teacher, student, ti.TIConfig(truth=1.0), {})
    params = {"student": jf.functional(student)[1], "teacher": jf.functional(teacher)[1]}
    with pytest.raises(ValueError, match="`truth` needs labels"):
        jax.eval_shape(lambda: run(params, batch, None))
    with pytest.raises(ValueError, match="none of the teacher's attention.probs"):
        ti.intervene(jf.functional(student)[0], "map", {})
