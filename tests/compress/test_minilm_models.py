"""MiniLM on whole models: the oracle pair, what gets a gradient, and the recipe."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxformers import functional, hub, paths, with_params
from jaxformers.compress.minilm import MiniLMConfig, check_models, minilm_objective, teacher_rows, v1, v2
from jaxformers.models import bert, llama


def close(actual, expected, rtol, floor=0.0):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=max(rtol * np.abs(expected).max(), floor))


def load_side(d, side, config, directory):
    """One model of the oracle pair, through a checkpoint on disk."""
    directory.mkdir()
    tensors = {k.removeprefix(f"{side}."): d[k] for k in d.files if k.startswith(f"{side}.")}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, directory / "model.safetensors")
    hf = {"model_type": "bert", "architectures": ["BertModel"], **config}
    (directory / "config.json").write_text(json.dumps(hf))
    return hub.load(directory)


def hf_name(path):
    """layers.0.attention.query.kernel -> encoder.layer.0.attention.self.query.weight"""
    owner, leaf = path.rsplit(".", 1)
    for ours, theirs in bert.KEYS.items():
        i = owner.split(".")[1] if owner.startswith("layers.") else ""
        if ours.format(i) == owner:
            return f"{theirs.format(i)}.{'bias' if leaf == 'bias' else 'weight'}"
    raise KeyError(path)


@pytest.fixture(scope="module")
def pair(shared, tmp_path_factory):
    d = np.load(shared / "oracles" / "minilm" / "bert_pair.npz")
    options = json.loads(str(d["options"]))
    root = tmp_path_factory.mktemp("pair")
    models = [load_side(d, side, options[f"{side}_config"], root / side) for side in ("teacher", "student")]
    batch = {k: jnp.array(d[k], jnp.int32) for k in ("input_ids", "attention_mask")}
    return d, options, *models, batch


def loss_and_grads(teacher, student, config, batch, **options):
    objective, params, freeze = minilm_objective(teacher, student, config, **options)

    @jax.jit
    def run(params):
        loss = lambda s: objective(None, {**params, "student": s}, batch, None)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params["student"])
        return value, metrics, grads

    return *run(params), freeze


def test_v1_of_the_oracle_pair(pair):
    d, options, teacher, student, batch = pair
    loss, metrics, grads, freeze = loss_and_grads(teacher, student, v1(), batch)
    close(loss, d["v1_loss"], 1e-5)
    close(metrics["QK"], d["v1_loss_at"], 1e-5)
    close(metrics["VV"], d["v1_loss_vr"], 1e-5)
    zero = []
    # a key's bias shifts all logits of a row alike: its true gradient is 0 and what is left is float32 rounding
    floor = 1e-6 * max(np.abs(d[k]).max() for k in d.files if k.startswith("v1_grad."))
    for path, grad in paths.flatten(grads).items():
        name = hf_name(path)
        grad = grad.T if path.endswith("kernel") else grad
        if (grad == 0).all():
            zero.append(name)
        else:
            close(grad, d[f"v1_grad.{name}"], 1e-4, floor)
    assert sorted(zero) == sorted(options["v1_params_without_gradient"])
    frozen = [hf_name(p.removeprefix("student.")) for p in freeze if p.startswith("student.")]
    assert sorted(frozen) == sorted(zero)


@pytest.mark.parametrize("which", [0, 1])
def test_v2_of_the_oracle_pair(pair, which):
    d, options, teacher, student, batch = pair
    o = options["v2"][which]
    relations = tuple(("_QKV"[m] + "_QKV"[n], weight) for m, n, weight in o["relations"])
    heads, layers = o["relation_heads"], (o["teacher_layer"], o["student_layer"])
    config = MiniLMConfig(relations, relation_heads=heads, teacher_layer=layers[0], student_layer=layers[1])
    loss, _, grads, _ = loss_and_grads(teacher, student, config, batch)
    close(loss, d[f"v2_{which}_loss"], 1e-5)
    flat = {hf_name(p): (g.T if p.endswith("kernel") else g) for p, g in paths.flatten(grads).items()}
    checked = [k for k in d.files if k.startswith(f"v2_{which}_grad.")]
    assert len(checked) >= 5
    floor = 1e-6 * max(np.abs(d[k]).max() for k in checked)  # as above, for the query's bias in Q K^T
    for k in checked:
        close(flat[k.removeprefix(f"v2_{which}_grad.")], d[k], 1e-4, floor)


def test_padding_order_and_scan(pair):
    _, _, teacher, student, batch = pair
    run = lambda batch, **options: loss_and_grads(teacher, student, v1(), batch, **options)
    loss, _, grads, _ = run(batch)
    noisy = {**batch, "input_ids": jnp.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    close(run(noisy)[0], loss, 1e-6)
    close(run({k: v[::-1] for k, v in batch.items()})[0], loss, 1e-6)
    scanned = run(batch, scan_layers=True, remat="full")
    close(scanned[0], loss, 1e-6)
    stacked = scanned[2]["layers"]["*"]["attention"]["query"]["kernel"]
    close(stacked[1], grads["layers"]["1"]["attention"]["query"]["kernel"], 1e-4)


def test_a_copy_has_loss_zero(pair):
    _, _, teacher, _, batch = pair
    for config in (v1(), v2(relation_heads=6)):
        loss, _, grads, _ = loss_and_grads(teacher, teacher, config, batch)
        assert loss == 0 and max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-6


def test_rotating_the_students_values_changes_nothing(pair):
    """V -> V R within each head leaves V V^T alone."""
    _, _, teacher, student, batch = pair
    apply, params = functional(student)
    value = params["layers"]["1"]["attention"]["value"]
    heads, size = 4, student.config.hidden_size // 4
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (heads, size, size)))[0]
    turn = lambda x: jnp.einsum("...hd,hde->...he", x.reshape(*x.shape[:-1], heads, size), rotation).reshape(x.shape)
    turned = {**params, "layers": {**params["layers"]}}
    turned["layers"]["1"] = {**params["layers"]["1"]}
    turned["layers"]["1"]["attention"] = {
        **params["layers"]["1"]["attention"],
        "value": {"kernel": turn(value["kernel"]), "bias": turn(value["bias"])},
    }
    before = loss_and_grads(teacher, student, v1(), batch)[0]
    close(loss_and_grads(teacher, with_params(student, turned), v1(), batch)[0], before, 1e-5)


def small(layers=2, width=16, heads=4, **kw):
    config = bert.Config(50, width, layers, heads, 2 * width, max_position_embeddings=16, pooler=False, **kw)
    return hub.init(config, key=jax.random.key(layers))


def test_dropout_acts_on_the_student_only():
    teacher, student = small(3, hidden_dropout_prob=0.5), small(2, hidden_dropout_prob=0.5)
    objective, params, _ = minilm_objective(teacher, student)
    batch = {"input_ids": jnp.arange(12).reshape(2, 6), "attention_mask": jnp.ones((2, 6), jnp.int32)}
    loss = jax.jit(lambda p, k: objective(None, p, batch, k)[0])
    values = [loss(params, k) for k in (None, None, jax.random.key(0), jax.random.key(1))]
    assert values[0] == values[1] and values[0] != values[2] != values[3]
    grads = jax.jit(jax.grad(lambda p: objective(None, p, batch, None)[0]))(params)
    assert all((g == 0).all() for g in jax.tree.leaves(grads["teacher"]))


def test_the_teacher_may_be_asked_beforehand():
    teacher, student = small(3, hidden_dropout_prob=0.5), small(2)
    rows = {"input_ids": np.arange(40, dtype=np.int32).reshape(5, 8), "attention_mask": np.ones((5, 8), np.int32)}
    rows["attention_mask"][3, 5:] = 0
    configs = [v1(), v2(relation_heads=2, teacher_layer=2)]
    known = teacher_rows(teacher, rows, configs, batch_size=2, dtype="float32")  # 5 rows: the last batch is a small one
    assert {name for name in known if name.startswith("teacher.")} == {
        "teacher.layers.2.attention.scores", "teacher.layers.2.attention.value.output",
        *(f"teacher.layers.1.attention.{name}.output" for name in ("query", "key", "value")),
    }  # fmt: skip
    for config in configs:
        objective, params, _ = minilm_objective(teacher, student, config)
        params["student"]["layers"]["0"]["attention"]["query"]["kernel"] *= 9.0  # something to tell apart
        loss = jax.jit(lambda p, b: objective(None, p, b, None)[0])  # noqa: B023
        np.testing.assert_allclose(loss(params, known), loss(params, rows), rtol=1e-5)
        nobody = {**params, "teacher": jax.tree.map(jnp.zeros_like, params["teacher"])}
        assert loss(nobody, known) == loss(params, known) != loss(nobody, rows), "the teacher is not run again"
        half = teacher_rows(teacher, rows, [config], dtype="float16")
        np.testing.assert_allclose(loss(params, half), loss(params, rows), rtol=1e-2)
    objective, params, _ = minilm_objective(teacher, student, v1(teacher_layer=1))
    with pytest.raises(ValueError, match=r"other sites of the teacher than .*layers.0.attention.scores"):
        objective(None, params, known, None)
    with pytest.raises(ValueError, match="configs"):
        teacher_rows(teacher, rows, [])


def test_decoders_with_grouped_heads():
    sizes = dict(vocab_size=50, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32)
    deep, flat = (hub.init(llama.Config(num_hidden_layers=n, **sizes), key=jax.random.key(n)) for n in (3, 1))
    ids = jax.random.randint(jax.random.key(0), (2, 8), 0, 50)
    batch = {"input_ids": ids, "attention_mask": jnp.ones((2, 8), jnp.int32)}
    loss, metrics, grads, freeze = loss_and_grads(deep, flat, v1(causal=True), batch)
    assert loss > 0 and set(metrics) == {"QK", "VV"}
    assert jnp.abs(grads["layers"]["0"]["attention_norm"]["scale"]).max() > 0  # pre-norm: below the projections
    assert all((g == 0).all() for p, g in paths.flatten(grads).items() if f"student.{p}" in freeze)
    assert all((g != 0).any() for p, g in paths.flatten(grads).items() if f"student.{p}" not in freeze)
    # v1 reads the true attention, rotary positions included; at the first layer only tokens and positions matter
    _, probs = jax.jit(lambda p: _probs(deep, p, batch))(functional(deep)[1])
    assert probs.shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="QK of the teacher compares widths 16 and 8"):
        check_models(deep, flat, v2(relation_heads=2, relations=(("QK", 1.0),), causal=True))
    with pytest.raises(ValueError, match="causal"):
        check_models(deep, flat, v1())
    with pytest.raises(ValueError, match="causal"):
        check_models(small(), small(), v1(causal=True))


def _probs(model, params, batch):
    from jaxformers import reap

    out, seen = reap(functional(model)[0], "layers.2.attention.probs")(params, batch)
    return out.last_hidden_state, seen["layers.2.attention.probs"]


def test_errors_of_unequal_models():
    twelve, eight = small(2, 48, 12), small(2, 48, 8)
    with pytest.raises(ValueError, match="equal head counts: teacher 12, student 8; use relation heads"):
        check_models(twelve, eight, v1())
    assert check_models(twelve, eight, v2(relation_heads=16)) == (2, 2)
    with pytest.raises(ValueError, match="relation_heads: 9 do not divide the teacher's width 48"):
        check_models(twelve, eight, v2(relation_heads=9))
    with pytest.raises(ValueError, match="teacher_layer: 3 is not in 1..2"):
        check_models(twelve, eight, v2(relation_heads=8, teacher_layer=3))
    with pytest.raises(ValueError, match="student_layer: 0 is not in 1..2"):
        check_models(twelve, eight, dataclasses.replace(v2(relation_heads=8), student_layer=0))
