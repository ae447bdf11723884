"""AxFormer against the official patched BERT: structures, hard attention, the whole search; then our own surgery."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import nn
from jaxformers.compress import axformer
from jaxformers.compress.axformer_report import report
from jaxformers.compress.axformer_structure import Structure, masks_of

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def read(oracles, name):
    with np.load(oracles / "axformer" / f"{name}.npz") as z:
        arrays = dict(z)
    data = {key: arrays[key].astype(np.int32) for key in INPUTS if key in arrays}
    return arrays, json.loads(str(arrays["options"])), data


@pytest.fixture(scope="module")
def bert(oracles):
    return jf.load(oracles / "axformer" / "model")


@pytest.fixture(scope="module")
def search(oracles):
    return read(oracles, "search")


@pytest.fixture(scope="module")
def found(bert, search, tmp_path_factory):
    """The oracle's search, with its log."""
    _, options, data = search
    log = tmp_path_factory.mktemp("axformer") / "search.jsonl"
    result = axformer.specialise(
        bert, data, k=options["K"], group_size=options["group"], slack=options["slack"],
        majority=options["majority"], batch_size=options["batch"], log=log,
    )  # fmt: skip
    return result, log


def structure_of(model, given, k, group):
    empty = [[]] * 3
    return dataclasses.replace(
        Structure.whole(model, k, group),
        hard_attn=tuple(given.get("hard", ())), attn_prune=tuple(given.get("att", ())),
        ffn_prune=tuple(given.get("ffn", ())), attn_heads=tuple(map(tuple, given.get("aa", empty))),
        ffn_groups=tuple(map(tuple, given.get("fa", empty))),
    )  # fmt: skip


def logits_of(model, data):
    apply, params = jf.functional(model)
    return np.asarray(jax.jit(apply)(params, {n: x for n, x in data.items() if n != "labels"}).logits)


# ---- the official model ----------------------------------------------------------------------------------------------


def test_losses_of_many_structures(oracles, bert):
    arrays, options, data = read(oracles, "structures")
    evaluate = axformer.evaluator(bert, data, k=options["K"], batch_size=128)
    for i, given in enumerate(options["structures"]):
        loss, each, classes = evaluate(structure_of(bert, given, options["K"], options["group"]))
        np.testing.assert_allclose(each, arrays[f"sample_loss{i}"], rtol=0, atol=2e-5)
        assert loss == pytest.approx(float(arrays[f"loss{i}"]), abs=2e-5)
        assert (classes == arrays[f"logits{i}"].argmax(-1)).all()
    assert evaluate.program._cache_size() == 1


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_samples_are_spread_over_a_mesh(oracles):
    arrays, options, data = read(oracles, "structures")
    model = jf.load(oracles / "axformer" / "model", mesh=jf.mesh("data=8"))
    evaluate = axformer.evaluator(model, data, k=options["K"], batch_size=128)
    _, each, _ = evaluate(structure_of(model, options["structures"][8], options["K"], options["group"]))
    np.testing.assert_allclose(each, arrays["sample_loss8"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("i", [2, 5, 8])
def test_models_without_what_a_structure_removes(oracles, bert, i, tmp_path):
    """Logits of the official simulation, from a model in which the parts are gone; saved and read again."""
    arrays, options, data = read(oracles, "structures")
    structure = structure_of(bert, options["structures"][i], options["K"], options["group"])
    small = axformer.specialised(bert, structure)
    np.testing.assert_allclose(logits_of(small, data), arrays[f"logits{i}"], rtol=0, atol=2e-5)
    jf.save(small, tmp_path / "small")
    assert (logits_of(jf.load(tmp_path / "small"), data) == logits_of(small, data)).all()


@pytest.mark.parametrize("k", [1, 3, 7, 11])
def test_the_hard_attention_operation(oracles, k):
    arrays, _, _ = read(oracles, "hard_attention_op")
    scores = arrays["scores"] + (1 - arrays["key_mask"])[:, None, None] * -10000
    found = np.asarray(nn.keep_largest(jax.nn.softmax(scores, -1), k))
    np.testing.assert_allclose(found, arrays[f"probs_k{k}"], rtol=0, atol=1e-6)


def test_the_whole_search(search, found):
    arrays, options, data = search
    result, _ = found
    for ours, (kind, layer, index, loss, improved, accepted) in zip(result.trials, options["trace"], strict=True):
        assert (ours.kind, ours.layer, ours.index, ours.improved) == (kind, layer, index, improved)
        assert ours.loss == pytest.approx(loss, abs=1e-4) and ours.accepted == bool(accepted)
    sets = options["result"]
    assert result.structure.hard_attn == tuple(sets["hard"]) and result.structure.ffn_prune == tuple(sets["ffn"])
    assert result.structure.attn_prune == tuple(sets["att"])
    assert result.structure.attn_heads == tuple(map(tuple, sets["aa"]))
    assert result.structure.ffn_groups == tuple(map(tuple, sets["fa"]))
    assert result.base_loss == pytest.approx(float(arrays["base_loss"]), abs=1e-4)
    assert result.min_loss == pytest.approx(float(arrays["final_min_loss"]), abs=1e-4)
    np.testing.assert_allclose(logits_of(result.model, data), arrays["final_logits"], rtol=0, atol=1e-4)
    assert result.complete and not result.constant and result.evaluations == 1 + len(options["trace"])


def test_parameters_that_are_gone(search, found, bert):
    _, options, _ = search
    count = lambda model: sum(x.size for x in jax.tree.leaves(jf.functional(model)[1]))
    assert count(bert) == options["params_before"] and count(found[0].model) == options["params_after"]


def test_accepted_losses_fall(found):
    losses = [found[0].base_loss, *(t.loss for t in found[0].trials if t.accepted)]
    assert all(a > b for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] == found[0].min_loss
    depth, heads, groups = 3, 4, 4
    assert found[0].evaluations <= 1 + depth + depth * (2 + groups + heads)


# ---- the log, the budget ---------------------------------------------------------------------------------------------

OPTIONS = {"k": 5, "group_size": 24}


def test_a_search_goes_on_where_its_log_ends(bert, search, found, tmp_path, monkeypatch):
    data, (whole, log) = search[2], found
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(whole.trials)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[:12]))
    counted = []
    real = axformer.evaluator

    def counting(*args, **kwargs):
        evaluate = real(*args, **kwargs)
        return lambda structure: counted.append(structure) or evaluate(structure)

    monkeypatch.setattr(axformer, "evaluator", counting)
    again = axformer.specialise(bert, data, log=part, **OPTIONS)
    assert again.trials == whole.trials and again.structure == whole.structure
    assert part.read_text() == log.read_text()
    assert len(counted) == 1 + (len(whole.trials) - 11) + 1  # the first, those missing, and the last once more


def test_a_budget_ends_the_search_early(bert, search, found, tmp_path):
    whole, log = found[0], tmp_path / "log.jsonl"
    early = axformer.specialise(bert, search[2], budget=6, log=log, **OPTIONS)
    assert not early.complete and early.evaluations == 6 and early.trials == whole.trials[:5]
    later = axformer.specialise(bert, search[2], budget=9, log=log, **OPTIONS)
    assert later.trials == whole.trials[:8] and len(log.read_text().splitlines()) == 9


def test_logs_that_are_not_this_search(bert, search, found, tmp_path):
    data, other = search[2], tmp_path / "other.jsonl"
    text = found[1].read_text()
    for content, options, message in (
        (text, {"k": 6}, "is of a search with other k"),
        (text, {"slack": 1.2}, "other slack"),
        (text.replace('"fingerprint": "', '"fingerprint": "0'), {}, "other weights or data"),
        (text[:-30], {}, "is no log of a search"),
        ("[]\n", {}, "is no log of a search"),
        (text.replace('"kind": "hard", "layer": 0', '"kind": "hard", "layer": 1', 1), {}, "line 2 of .* is not what"),
    ):
        other.write_text(content)
        with pytest.raises(ValueError, match=f"log: .*{message}"):
            axformer.specialise(bert, data, log=other, **{**OPTIONS, **options})
        assert other.read_text() == content


def test_elements_and_order(bert, search):
    seen = lambda **options: [
        (t.kind, t.layer) for t in axformer.specialise(bert, search[2], **OPTIONS, **options).trials
    ]
    assert seen(elements=("heads",), order=(1,)) == [("head", 1)] * 4
    assert seen(elements=("hard_attention",)) == [("hard", i) for i in range(3)]
    assert seen(elements=("blocks",), order=(0, 2)) == [("ffn", 0), ("attn", 0), ("ffn", 2), ("attn", 2)]


# ---- structures as data ----------------------------------------------------------------------------------------------


def test_a_structure_is_saved_and_applied_to_another_checkpoint(bert, found, search, tmp_path):
    structure = found[0].structure
    structure.save(tmp_path / "structure.json")
    again = Structure.load(tmp_path / "structure.json")
    assert again == structure
    other = jf.init(bert.config, head="sequence_classification", key=jax.random.key(0))
    small = axformer.specialised(other, again)
    data = search[2]
    _, _, classes = axformer.evaluator(other, data, k=5, batch_size=61)(structure)
    assert (logits_of(small, data).argmax(-1) == classes).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 0}, "k and group_size must be 1 or more"), ({"hard_attn": [3]}, "hard_attn must hold numbers from 0 to 2"),
     ({"attn_heads": [[4], [], []]}, r"attn_heads\[0\] must hold"), ({"ffn_groups": [[], []]}, "one entry a layer"),
     ({"ffn_prune": ["0"]}, "expected integers"), ({"ffn_prune": 1}, "structure: "), ({"more": 1}, "an object with k")],
)  # fmt: skip
def test_structures_that_are_none(bert, tmp_path, change, message):
    value = {**Structure.whole(bert, 5, 24).to_json(), **change}
    (tmp_path / "s.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        Structure.load(tmp_path / "s.json")


def test_a_structure_of_another_model(bert):
    structure = Structure.whole(bert, 5, 24)
    for changed in (
        {"heads": (4, 4), "widths": (96, 96), "attn_heads": ((),) * 2, "ffn_groups": ((),) * 2},
        {"widths": (96, 96, 48)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="structure: it is for"):
            axformer.specialised(bert, dataclasses.replace(structure, **changed))


# ---- other models and tasks ------------------------------------------------------------------------------------------


def test_pre_norm_models_lose_blocks_as_their_gates_do(oracles):
    vit = jf.load(oracles / "backbones" / "vit")
    random = np.random.default_rng(0)
    data = {"pixel_values": random.standard_normal((4, 3, 32, 32)).astype(np.float32), "labels": np.arange(4)}
    structure = dataclasses.replace(
        Structure.whole(vit, 3, 16), hard_attn=(0, 1, 2), attn_prune=(1,), ffn_prune=(1,), attn_heads=((1, 2), (), (0,))
    )
    expected = axformer.evaluator(vit, data, k=3, batch_size=4)(structure)[1]
    small = axformer.specialised(vit, structure)
    found = axformer.evaluator(small, data, k=None, batch_size=4)(None)[1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert len(small.layers) == 2


def test_losses_of_other_tasks():
    random = np.random.default_rng(0)
    logits = random.standard_normal((3, 5, 2)).astype(np.float32)
    softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    spans = {"start_positions": np.array([0, 1, 4]), "end_positions": np.array([2, 2, 4])}
    ends = softmax(np.swapaxes(logits, 1, 2))
    expected = [-(ends[i, 0, a] + ends[i, 1, b]) / 2 for i, (a, b) in enumerate(zip(*spans.values(), strict=True))]
    of = lambda logits, batch: np.asarray(axformer.sample_losses(nn.Output(logits=jax.numpy.asarray(logits)), batch))
    np.testing.assert_allclose(of(logits, spans), expected, rtol=1e-5)
    labels = np.array([[0, 1, -100, -100, -100], [1, 1, 1, 1, 1], [-100] * 5])
    tokens = softmax(logits)
    expected = [-(tokens[0, 0, 0] + tokens[0, 1, 1]) / 2, -tokens[1, :, 1].mean(), 0.0]
    np.testing.assert_allclose(of(logits, {"labels": jax.numpy.asarray(labels)}), expected, rtol=1e-5)
    numbers = np.array([0.5, -1, 2], np.float32)
    found = of(logits[:, 0, :1], {"labels": jax.numpy.asarray(numbers)})
    np.testing.assert_allclose(found, (logits[:, 0, 0] - numbers) ** 2, rtol=1e-5)


def test_retraining_keeps_the_structure(bert, found, search):
    data = search[2]
    config = jf.TrainConfig(steps=3, progress=False, optim=jf.train.OptimConfig(learning_rate=1e-3))
    result = axformer.retrain(bert, found[0].structure, [data], config, key=jax.random.key(0))
    assert jf.surgery.to_json(result.model) == jf.surgery.to_json(found[0].model)
    before, after = (
        axformer.evaluator(m, data, k=None, batch_size=61)(None)[0] for m in (found[0].model, result.model)
    )
    assert after < before


def test_the_report(bert, found, search):
    data, small = search[2], found[0].model
    test = {name: array[::-1] for name, array in data.items()}
    told = report(bert, small, data, test, repeats=2)
    assert (told.before.cost.parameters, told.after.cost.parameters) == (36099, 25123)
    assert told.after.validation_loss == pytest.approx(found[0].min_loss, abs=1e-4)
    assert told.before.test_loss == pytest.approx(found[0].base_loss, abs=1e-4)
    assert told.after.cost.macs < told.before.cost.macs and told.before.latency.batch == 61
    accuracy = float((logits_of(small, data).argmax(-1) == data["labels"]).mean())
    assert told.after.validation_metric == pytest.approx(accuracy) and "% of the parameters" in str(told)
    with pytest.raises(ValueError, match="it is the test set"):
        report(bert, small, data, data)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: hard attention keeps at least one key, got 0"),
        ({"elements": ("layers",)}, "elements: expected some of hard_attention"),
        ({"elements": ()}, "elements"), ({"slack": 0.9}, "slack"), ({"majority": 1.0}, "majority"),
        ({"budget": 0}, "budget"), ({"group_size": 25}, r"group_size: 25 does not divide"),
        ({"group_size": 0}, "group_size: expected at least one"),
        ({"order": (0, 0)}, "order: expected layers"), ({"order": (3,)}, "order: expected layers of 0 to 2"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(bert, search, options, message):
    with pytest.raises(ValueError, match=message):
        axformer.specialise(bert, search[2], **{**OPTIONS, **options})


def test_data_that_do_not_fit(bert, search):
    data = search[2]
    for changed, test, message in (
        ({n: x[:0] for n, x in data.items()}, None, "one common length, not 0"),
        ({**data, "labels": data["labels"][:3]}, None, "one common length"),
        ({n: x for n, x in data.items() if n != "labels"}, None, "validation: no labels"),
        (data, {n: x.copy() for n, x in data.items()}, "it is the test set"),
    ):
        with pytest.raises(ValueError, match=message):
            axformer.specialise(bert, changed, test=test, **OPTIONS)


def test_models_without_one_stack(oracles):
    t5 = jf.load(oracles / "backbones" / "t5-v1_0")
    with pytest.raises(ValueError, match="has no single stack of layers"):
        Structure.whole(t5)


def test_constant_predictions_are_told(bert, search, caplog):
    """A loss that likes one class best: the search finds what makes every prediction that class."""
    data = search[2]
    one = lambda out, batch: -out.logits[:, 0] + out.logits[:, 1:].max(-1)
    result = axformer.specialise(bert, data, losses=one, elements=("blocks",), **OPTIONS)
    constant = len(set(logits_of(result.model, data).argmax(-1).tolist())) == 1
    assert result.constant == constant and ("same class" in caplog.text) == constant


def test_masks_name_what_is_gone(bert):
    structure = Structure.whole(bert, 5, 24).without("head", 1, 2).without("ffn_group", 0, 3).without("attn", 2)
    masks = masks_of(structure)
    assert masks["heads"]["layers.1.attention"].tolist() == [1, 1, 0, 1]
    assert np.flatnonzero(masks["ffn"]["layers.0.mlp"] == 0).tolist() == list(range(72, 96))
    assert masks["sublayers"]["layers.2.attention"] == 0 and masks["sublayers"]["layers.2.mlp"] == 1
