"""Distillation and preference optimisation of whole models: losses, what is trained, the recipes, resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers import losses, paths
from jaxformers.data.batches import array_batches
from jaxformers.mesh import shardings
from jaxformers.train import OptimConfig, TrainConfig, distil, preference


@pytest.fixture(scope="module")
def pair():
    """Two decoders of unequal architecture and one vocabulary."""
    sizes = {"num_hidden_layers": 1, "attention_probs_dropout_prob": 0.0}
    dropout = {"hidden_dropout_prob": 0.0, "embedding_dropout_prob": 0.0}
    return tiny.model("llama", **sizes), tiny.model("gpt2", **sizes, **dropout)


def batches(n=8, length=6, seed=0):
    ids = np.random.default_rng(seed).integers(1, 20, (n, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[::2, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def value_and_grads(made, batch):
    objective, params, _ = made
    run = jax.jit(jax.value_and_grad(lambda p: objective(None, p, batch, None), has_aux=True))
    return run(params)


def value(made, batch):
    objective, params, _ = made
    return jax.jit(lambda p: objective(None, p, batch, None))(params)


def test_loss_of_two_architectures_by_hand(pair):
    batch = batches(3)
    made = distil.distil_objective(*pair, kl=0.7, ce=0.3, temperature=2.0, chunk=2)
    (loss, metrics), grads = value_and_grads(made, batch)
    teacher, student = (np.float64(jax.jit(f[0])(f[1], batch).logits) for f in map(jf.functional, pair))
    real, both = batch["attention_mask"] == 1, batch["attention_mask"][:, 1:] == 1
    log = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    t, s = log(teacher / 2), log(student / 2)
    kl = 4 * (np.exp(t) * (t - s)).sum(-1)[real].mean()
    ce = -np.take_along_axis(log(student)[:, :-1], batch["input_ids"][:, 1:, None], -1)[..., 0][both].mean()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4) and metrics["ce"] == pytest.approx(ce, rel=1e-5)
    assert loss == pytest.approx(0.7 * kl + 0.3 * ce, rel=1e-4) and metrics["weight"] == real.sum()
    assert not any(np.any(g) for g in jax.tree.leaves(grads["teacher"]))
    assert all(np.any(g) for g in jax.tree.leaves(grads["student"]))
    by_sequence = distil.distil_objective(*pair, temperature=2.0, reduction="sequence")
    _, metrics = value(by_sequence, batch)
    assert metrics["kl"] == pytest.approx(kl * real.sum() / 3, rel=1e-4) and metrics["weight"] == 3


def test_a_copy_has_no_loss_and_padding_none_either(pair):
    teacher, _ = pair
    made = distil.distil_objective(teacher, teacher)
    batch = batches(4)
    (loss, _), grads = value_and_grads(made, batch)
    assert abs(loss) < 1e-6 and max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-5
    objective, params, _ = distil.distil_objective(*pair, ce=0.5)
    noisy = {**batch, "input_ids": np.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    run = jax.jit(lambda params, batch: objective(None, params, batch, None)[0])
    assert run(params, batch) == pytest.approx(float(run(params, noisy)), rel=1e-6)


def test_sites_compose_and_pair_up_by_name(pair):
    teacher = tiny.model("llama", num_hidden_layers=3)
    student = tiny.model("llama", num_hidden_layers=2, initializer_range=0.3)
    square = lambda t, s, mask: jnp.mean(jnp.where(mask[..., None] == 1, (t - s) ** 2, 0))
    sites = {
        "layers.*.output": distil.SiteLoss(square, 2.0, teacher="layers.{0,2}.output"),
        "embeddings": distil.SiteLoss(square, 0.5),
    }
    batch = batches(3)
    loss, metrics = value(distil.distil_objective(teacher, student, kl=0, sites=sites), batch)
    look = lambda model: jax.jit(jf.reap(jf.functional(model)[0], ("layers.*.output", "embeddings")))(
        jf.functional(model)[1], batch
    )[1]
    t, s = look(teacher), look(student)
    expected = {
        "layers.*.output": np.mean([square(t[f"layers.{i}.output"], s[f"layers.{j}.output"], batch["attention_mask"])
                                    for i, j in ((0, 0), (2, 1))]),
        "embeddings": square(t["embeddings"], s["embeddings"], batch["attention_mask"]),
    }  # fmt: skip
    for name, number in expected.items():
        assert metrics[name] == pytest.approx(float(number), rel=1e-5)
    assert loss == pytest.approx(float(2 * expected["layers.*.output"] + 0.5 * expected["embeddings"]), rel=1e-5)

    kept = distil.teacher_rows(teacher, batch, ["layers.{0,2}.output", "embeddings"], batch_size=2, dtype="float32")
    again, _ = value(distil.distil_objective(teacher, student, kl=0, sites=sites), kept)
    assert again == pytest.approx(float(loss), rel=1e-6)
    with pytest.raises(ValueError, match="2 sites of the student, and 'layers.*.output' 3 of the teacher"):
        wrong = {"layers.*.output": distil.SiteLoss(square)}
        value(distil.distil_objective(teacher, student, kl=0, sites=wrong), batch)
    with pytest.raises(ValueError, match="teacher_rows keeps sites, no logits"):
        value(distil.distil_objective(teacher, student, sites=sites), kept)


def training(steps, **options):
    optim = OptimConfig(learning_rate=0.02, schedule="constant", weight_decay=0.1)
    return TrainConfig(steps=steps, optim=optim, progress=False, log_every=1, **options)


def changed(before, after):
    before, after = (paths.flatten(jf.functional(m)[1]) for m in (before, after))
    return {path for path, x in before.items() if np.any(x != after[path])}


def test_the_recipe_resumes_and_leaves_both_models_alone(pair, tmp_path):
    teacher, student = pair
    old = [jax.tree.map(np.array, jf.functional(m)[1]) for m in pair]
    run = lambda steps, where: distil.distil_logits(
        teacher, student, array_batches(batches(), 4, seed=3), training(steps, checkpoint_every=2),
        key=jax.random.key(0), directory=where, ce=0.5,
    )  # fmt: skip
    straight = run(6, tmp_path / "straight")
    curve = lambda trained: [r["loss"] for r in trained.history if r["kind"] == "train"]
    assert curve(straight)[-1] < 0.8 * curve(straight)[0]
    run(4, tmp_path / "cut")
    resumed = run(6, tmp_path / "cut")
    assert not changed(straight.model, resumed.model) and curve(resumed) == curve(straight)
    for model, params in zip(pair, old, strict=True):
        assert tiny.largest_difference(jf.functional(model)[1], params) == 0
    part = distil.distil_logits(
        teacher, student, array_batches(batches(), 4), training(1, trainable=("layers.*.attention.**",)),
        key=jax.random.key(0),
    )  # fmt: skip
    moved = changed(student, part.model)
    assert moved and all(".attention." in path for path in moved)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_on_a_mesh_losses_and_updates_are_the_same(pair):
    mesh = jf.mesh("data=2,fsdp=2,tensor=2")
    run = lambda mesh: distil.distil_logits(
        *pair, array_batches(batches(), 4, seed=3), training(2), key=jax.random.key(0), chunk=2, mesh=mesh
    )
    alone, spread = run(None), run(mesh)
    found = [[r["loss"] for r in done.history if r["kind"] == "train"] for done in (alone, spread)]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert len(jax.tree.leaves(jf.functional(spread.model)[1])[0].sharding.device_set) == 8
    rows = {name: np.repeat(x, 4, 0)[:4] for name, x in preference.preference_rows(PROMPTS, CHOSEN, REJECTED).items()}
    of = lambda made, params: jax.jit(lambda p: made[0](None, p, rows, None)[0])(params)
    made = [preference.dpo_objective(*pair, mesh=m) for m in (None, mesh)]
    placed = jax.device_put(made[1][1], shardings(mesh, made[1][1]))
    np.testing.assert_allclose(of(made[1], placed), of(made[0], made[0][1]), rtol=1e-5)


def test_errors(pair):
    teacher, student = pair
    for options, message in (
        ({"kl": -1.0}, "kl: its weight must be a number of 0 or more"),
        ({"kl": 0.0}, "every weight is 0"),
        ({"temperature": 0.0}, "temperature: must be > 0"),
        ({"reduction": "batchmean"}, "reduction: expected 'token' or 'sequence'"),
        ({"chunk": 0}, "chunk: expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            distil.distil_objective(teacher, student, **options)
    with pytest.raises(ValueError, match="its vocabulary has 20 entries, the student's 21"):
        distil.distil_objective(teacher, tiny.model("gpt2", vocab_size=21))
    with pytest.raises(ValueError, match="GPT2 has none"):
        distil.distil_objective(teacher, tiny.model("gpt2", head=None))
    with pytest.raises(ValueError, match="no site of this model matches 'layers.9.output'"):
        sites = {"layers.9.output": distil.SiteLoss(losses.kl_divergence)}
        value(distil.distil_objective(teacher, student, kl=0, sites=sites), batches(2))


# ---- preferences -----------------------------------------------------------------------------------------------------

PROMPTS, CHOSEN, REJECTED = [[3, 4, 5], [6], [7, 8]], [[9, 10], [11, 12, 13], [14]], [[10], [12, 11], [15, 16, 17]]


def test_preference_rows_mark_the_answer_alone_and_keep_to_the_limits():
    rows = preference.preference_rows(PROMPTS, CHOSEN, REJECTED, pad_id=1)
    assert all(x.shape == (3, 5) for x in rows.values())
    assert rows["chosen.input_ids"].tolist() == [[3, 4, 5, 9, 10], [6, 11, 12, 13, 1], [7, 8, 14, 1, 1]]
    assert rows["chosen.labels"][0].tolist() == [-100, -100, 9, 10, -100]
    assert rows["rejected.labels"].tolist()[1:] == [[12, 11, -100, -100, -100], [-100, 15, 16, 17, -100]]
    assert rows["rejected.attention_mask"].sum(1).tolist() == [4, 3, 5]
    short = preference.preference_rows(PROMPTS, CHOSEN, REJECTED, max_prompt=2, max_length=3)
    assert short["chosen.input_ids"].tolist() == [[4, 5, 9], [6, 11, 12], [7, 8, 14]]
    assert short["rejected.labels"].tolist() == [[-100, 10, -100], [12, 11, -100], [-100, 15, -100]]
    for args, message in (
        ((PROMPTS, CHOSEN, REJECTED[:2]), "expected as many of each, got 3, 3, 2"),
        ((PROMPTS, [[9], [], [1]], REJECTED), "chosen: number 1 is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            preference.preference_rows(*args)
    with pytest.raises(ValueError, match="expected 1 <= max_prompt < max_length, got 4, 4"):
        preference.preference_rows(PROMPTS, CHOSEN, REJECTED, max_prompt=4, max_length=4)


def test_dpo_by_hand_and_as_a_recipe(pair):
    reference, policy = pair
    rows = preference.preference_rows(PROMPTS, CHOSEN, REJECTED)
    (loss, metrics), grads = value_and_grads(preference.dpo_objective(policy, reference, beta=0.5, chunk=2), rows)
    assert not any(np.any(g) for g in jax.tree.leaves(grads["reference"]))

    def gap(model):
        apply, params = jf.functional(model)
        apply, found = jax.jit(apply), {}
        for side, answers in (("chosen", CHOSEN), ("rejected", REJECTED)):
            batch = {name: rows[f"{side}.{name}"] for name in ("input_ids", "attention_mask")}
            logits = np.float64(apply(params, batch).logits)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            rest = [log_p[i, len(prompt) - 1 :] for i, prompt in enumerate(PROMPTS)]
            found[side] = np.array([sum(r[np.arange(len(a)), a]) for r, a in zip(rest, answers, strict=True)])
        return found["chosen"] - found["rejected"]

    margin = 0.5 * (gap(policy) - gap(reference))
    assert loss == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    assert metrics["margin"] == pytest.approx(margin.mean(), rel=1e-3)
    assert metrics["accuracy"] == pytest.approx((margin > 0).mean())

    trained = preference.dpo(policy, array_batches(rows, 3), training(8), key=jax.random.key(0))
    records = [r for r in trained.history if r["kind"] == "train"]
    assert records[0]["loss"] == pytest.approx(np.log(2), rel=1e-5) and records[-1]["loss"] < 0.5
    assert records[-1]["accuracy"] == 1 and changed(policy, trained.model)


def test_dpo_errors(pair):
    with pytest.raises(ValueError, match="beta: must be > 0"):
        preference.dpo_objective(*pair, beta=0)
    with pytest.raises(ValueError, match="policy: expected a causal_lm head, got none"):
        preference.dpo_objective(tiny.model("gpt2", head=None), pair[0])
    with pytest.raises(ValueError, match="batch: it has no chosen.input_ids"):
        value(preference.dpo_objective(*pair), batches(2))
