"""VTrans' gates, budgets, Lagrangian, distillation and rounding against independent references."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxformers.compress import vtrans, vtrans_distil
from jaxformers.compress.vtrans_distil import DistilConfig


def read(oracles, name):
    with np.load(oracles / "vtrans" / f"{name}.npz") as z:
        arrays = {key: z[key] for key in z.files}
    return arrays, json.loads(str(arrays["options"]))


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-6)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_gate_samples_costs_and_hardens_as_the_published_layer(i, oracles):
    a, options = read(oracles, "mask_layer")
    multiplier = options["layers"][i]["kl_mult"]
    x, eps = jnp.asarray(a[f"x{i}"]), jnp.asarray(a[f"eps{i}"])
    gate = {name: jnp.asarray(a[f"{name}{i}"]) for name in ("mu", "logD")}
    close(vtrans.times(x, gate, eps), a[f"y{i}"])
    close(vtrans.kl(gate, multiplier), a[f"kld{i}"])
    close(vtrans.log_alpha(gate), a[f"logalpha{i}"])
    close(vtrans.stays(gate), a[f"hard{i}"])
    close(vtrans.keep_probability(gate, options["steepness"]), a[f"soft{i}"])
    close(vtrans.sample(x, gate, None), a[f"y_eval{i}"])

    def loss(gate, x):
        y = vtrans.times(x, gate, eps)
        return 0.5 * jnp.sum(y**2) + 0.01 * vtrans.kl(gate, multiplier) + 3 * vtrans.keep_probability(gate).sum()

    grads, g_x = jax.grad(loss, argnums=(0, 1))(gate, x)
    for name, found in (("mu", grads["mu"]), ("logD", grads["logD"]), ("x", g_x)):
        close(found, a[f"g_{name}{i}"], 2e-5)


def test_noise_differs_by_row_and_unit_and_has_the_gates_variance():
    gate = {"mu": jnp.asarray([1.0, 2.0]), "logD": jnp.log(jnp.asarray([0.04, 0.25]))}
    y = vtrans.sample(jnp.ones((2, 4000, 2)), gate, jax.random.key(0)).reshape(-1, 2)
    assert np.abs(y.mean(0) - gate["mu"]).max() < 0.02 and np.abs(y.std(0) - np.asarray([0.2, 0.5])).max() < 0.02
    assert len(np.unique(np.asarray(y))) > 15_900
    whole = vtrans.sample(jnp.ones((3, 5, 8)), {"mu": jnp.ones(()), "logD": jnp.zeros(())}, jax.random.key(1))
    assert np.ptp(np.asarray(whole), axis=-1).max() == 0 and len(np.unique(np.asarray(whole))) == 15  # one a row


KINDS = {"params_bert": "budget_bert", "params_bert_noemb": "budget_bert", "flops_bert": "budget_bert",
         "params_llama": "budget_llama"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_expected_sparsity_and_its_gradient(kind, oracles):
    a, o = read(oracles, KINDS[kind])
    with jax.enable_x64(True):
        model = budget_model(kind, o)
        cost = vtrans.costs(
            model, "flops" if "flops" in kind else "params", length=o["seq"],
            embeddings=False if "noemb" in kind else None,
        )  # fmt: skip
        gates = budget_gates(a, o["L"])
        assert cost.total == a[f"{kind}_total"]

        def pushed(gates):
            s = cost.sparsity(jax.tree.map(vtrans.keep_probability, gates, is_leaf=vtrans.is_gate))
            return vtrans.lagrangian(s, o["target"], o["lambda1"], o["lambda2"]), s

        (value, s), grads = jax.value_and_grad(pushed, has_aux=True)(gates)
        close(s, a[f"{kind}_sparsity"], 1e-9)
        close(value, a[f"{kind}_Ls"], 1e-9)
        close(grads["hidden"]["mu"], a[f"{kind}_g_mu_hid"], 1e-9)
        close(grads["hidden"]["logD"], a[f"{kind}_g_logD_hid"], 1e-9)
        stacks = [("heads", "attention", "head"), ("ffn", "mlp", "int")]
        stacks += [("sublayers", "attention", "att"), ("sublayers", "mlp", "ffn")] if "mu_att" in a else []
        for ours, part, theirs in stacks:
            for leaf in ("mu", "logD"):
                found = np.stack([grads[ours][f"layers.{i}.{part}"][leaf] for i in range(o["L"])])
                close(found, a[f"{kind}_g_{leaf}_{theirs}"], 1e-9)


def budget_model(kind, o):
    sizes = {"vocab_size": o["V"], "hidden_size": o["d"], "num_hidden_layers": o["L"], "num_attention_heads": o["H"],
             "intermediate_size": o["f"], "max_position_embeddings": o["n_pos"]}  # fmt: skip
    if "llama" in kind:
        return tiny.model("llama", num_key_value_heads=o["H"], **{k: v for k, v in sizes.items() if "key" not in k})
    return tiny.model("bert", type_vocab_size=o["n_type"], **sizes)


def budget_gates(a, depth):
    gate = lambda name, i: {leaf: jnp.asarray(a[f"{leaf}_{name}"][i]) for leaf in ("mu", "logD")}
    per_layer = lambda part, name: {f"layers.{i}.{part}": gate(name, i) for i in range(depth)}
    found = {"heads": per_layer("attention", "head"), "ffn": per_layer("mlp", "int")}
    if "mu_att" in a:
        found["sublayers"] = per_layer("attention", "att") | per_layer("mlp", "ffn")
    return found | {"hidden": {"mu": jnp.asarray(a["mu_hid"]), "logD": jnp.asarray(a["logD_hid"])}}


def test_lambdas_climb_after_a_target_that_comes_step_by_step(oracles):
    a, o = read(oracles, "lagrangian_trace")
    with jax.enable_x64(True):
        optimizer = optax.chain(optax.scale(-1.0), optax.adamw(o["lr"], weight_decay=0.0))
        lambdas = {"1": jnp.zeros(()), "2": jnp.zeros(())}
        state, second = optimizer.init(lambdas), [0.0]
        for i, s in enumerate(a["expected_sparsity"]):
            t = vtrans.warmed_target(i, o["start"], o["target"], o["warmup_steps"])
            value, grads = jax.value_and_grad(lambda w, s=s, t=t: vtrans.lagrangian(s, t, w["1"], w["2"]))(lambdas)
            updates, state = optimizer.update(grads, state, lambdas)
            lambdas = optax.apply_updates(lambdas, updates)
            for name, found in (("target", t), ("Ls", value), ("lambda1_after", lambdas["1"])):
                assert abs(float(found) - a[name][i]) < 1e-9
            assert abs(float(lambdas["2"]) - a["lambda2_after"][i]) < 1e-9
            second.append(float(lambdas["2"]))
        assert np.all(np.diff(second) >= 0)


def test_distillation_losses_and_the_alignment_of_layers(oracles):
    a, o = read(oracles, "distillation")
    with jax.enable_x64(True):
        ce = vtrans_distil.ce_loss(jnp.asarray(a["teacher_logits"]), jnp.asarray(a["student_logits"]), o["T"])
        teacher = jnp.asarray(a["teacher_hidden"])[jnp.asarray(DistilConfig().chosen(12))]
        student, kernel = jnp.asarray(a["student_hidden"]), jnp.asarray(a["W"]).T
        errors = vtrans_distil.layer_errors(teacher, student, kernel, jnp.asarray(a["b"]))
        existing = jnp.asarray(a["existing"])
        layer = vtrans_distil.layer_loss(errors, existing)
        close(ce, a["ce"], 1e-9)
        close(errors, a["mse_matrix"], 1e-9)
        assert vtrans_distil.align(errors, existing).tolist() == o["alignment"]
        close(layer, a["layer_loss"], 1e-9)
        close(o["alpha"][0] * layer + o["alpha"][1] * ce, a["total"], 1e-9)


def test_alignment_keeps_order_and_reuses_the_last_layer_where_none_is_left():
    errors = jnp.asarray([[0.0, 9, 9, 9], [9.0, 0, 9, 9], [0.0, 9, 9, 9], [9.0, 9, 1, 0]])
    assert vtrans_distil.align(errors, jnp.ones(4, bool)).tolist() == [0, 0, 0, 3]
    assert vtrans_distil.align(errors, jnp.asarray([True, True, True, False])).tolist() == [0, 0, 0, 2]
    padded = jnp.asarray([[1, 1, 0]])
    teacher, student = jnp.zeros((1, 1, 3, 2)), jnp.ones((1, 1, 3, 2)).at[:, :, 2].set(100)
    assert vtrans_distil.layer_errors(teacher, student, jnp.eye(2), jnp.zeros(2), padded) == 1


@pytest.mark.parametrize("multiple", [8, 64, 128])
def test_widths_are_rounded_to_the_nearest_multiple(multiple, oracles):
    a, _ = read(oracles, "width_rounding")
    assert np.array_equal(vtrans.rounded(a["logalpha"], int(a["kept_before"]), multiple), a[f"keep_{multiple}"])
    assert len(vtrans.rounded(a["logalpha"], 1, multiple)) == multiple
    assert len(vtrans.rounded(a["logalpha"], 300, multiple)) == {8: 300, 64: 300, 128: 256}[multiple]  # all at most


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("kind", ["params", "flops"])
def test_masks_meet_the_hard_budget_whatever_the_gates_say(kind, keep):
    model = tiny.model("bert", hidden_size=64, num_attention_heads=8, intermediate_size=128, vocab_size=50)
    cost = vtrans.costs(model, kind, length=8)
    found = vtrans.init_gates(model, ("hidden", "heads", "ffn", "sublayers"), jax.random.key(0))
    random = np.random.default_rng(0)
    found = jax.tree.map(lambda x: x + random.normal(0, 2, x.shape), found)
    masks = vtrans.masks_within(found, cost, keep)
    left = 1 - float(cost.sparsity(jax.tree.map(lambda m: (m != 0) * 1.0, masks)))
    assert keep - 0.01 <= left <= keep + 0.005
    alphas = np.concatenate([np.ravel(vtrans.log_alpha(g)) for g in jax.tree.leaves(found, is_leaf=vtrans.is_gate)])
    on = np.concatenate([np.ravel(m) for m in jax.tree.leaves(masks)]) != 0
    assert alphas[on].mean() < alphas[~on].mean()


def test_gates_at_the_budget_are_left_as_they_are_and_keep_their_means():
    model = tiny.model("llama")
    cost = vtrans.costs(model)
    found = vtrans.init_gates(model, ("ffn",), jax.random.key(0))
    gate = found["ffn"]["layers.1.mlp"]
    gate["logD"] = jnp.where(jnp.arange(12) < 5, 9.0, -9.0)
    keep = 1 - 5 * 3 * 8 / cost.total
    masks = vtrans.masks_within(found, cost, keep)
    assert np.array_equal(masks["ffn"]["layers.1.mlp"], np.where(np.arange(12) < 5, 0, gate["mu"]))
    assert np.array_equal(masks["ffn"]["layers.0.mlp"], found["ffn"]["layers.0.mlp"]["mu"])


def test_what_may_not_go_has_a_price():
    model = tiny.model("bert")
    cost = vtrans.costs(model)
    tables = (20 + 12 + 2) * 8
    assert vtrans.floor(cost, ("heads", "ffn")) == pytest.approx(tables / cost.total)
    assert vtrans.floor(cost, ("heads", "ffn", "hidden", "sublayers")) == pytest.approx(tables / 8 / cost.total)
    grouped = vtrans.costs(tiny.model("llama", num_attention_heads=4, num_key_value_heads=2))
    assert grouped.terms[0].each == 2 * (2 * 2) + 2 * 2  # two queries, their output rows, a key and a value head
    single = vtrans.costs(tiny.model("llama"))
    assert (single.terms[0].each, single.terms[0].shared) == (8, 8)
    with pytest.raises(ValueError, match="length: a budget of FLOPs needs"):
        vtrans.costs(model, "flops")
    with pytest.raises(ValueError, match="layers: expected ascending numbers below the teacher's 4"):
        DistilConfig(layers=(1, 4)).chosen(4)
    with pytest.raises(ValueError, match="teacher: its logits have shape"):
        vtrans_distil.ce_loss(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
