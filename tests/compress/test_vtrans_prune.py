"""Pruning by VTrans from end to end on tiny models: budgets, modes, teachers, what comes out, errors."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers import gates
from jaxformers.compress import DistilConfig, VTransConfig, vib_prune
from jaxformers.compress.vtrans_prune import BudgetMissed
from jaxformers.models import roberta

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE = {**SIZES, "num_hidden_layers": 1}
QUICK = VTransConfig(steps=160, rate=1e-3, mask_rate=0.3, lambda_rate=0.3, kl_factor=1e-3, head_kl=4, hidden_kl=4,
                     warmup=0.5, check_every=40, tolerance=(0.02, 0.02), timed=False)  # fmt: skip


def rows(n=128):
    """Sequences that say yes when most of their first five ids are small."""
    ids = np.random.default_rng(0).integers(1, 40, (n, 8))
    mask = np.ones_like(ids)
    mask[::4, 6:] = 0
    labels = ((ids[:, :5] < 20).sum(1) > 2).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def classifier(**changes):
    return tiny.model("bert", "sequence_classification", intermediate_size=64, initializer_range=0.1,
                      hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **{**SIZES, **changes})  # fmt: skip


@pytest.fixture(scope="module")
def pruned():
    """A classifier at a fifth of its parameters, distilled from itself, with all its kinds of units to choose from."""
    model, config = classifier(), dataclasses.replace(QUICK, finetune_steps=10, timed=True)
    return model, vib_prune(model, rows(), {"params": 0.2}, teacher=model, config=config, key=jax.random.key(1),
                            val_data=rows(32))  # fmt: skip


def test_the_budget_is_met_and_what_is_reported_is_there(pruned):
    model, done = pruned
    report = done.report
    assert abs(report["actual_sparsity"] - 0.8) < 0.01 and abs(report["expected_sparsity"] - 0.8) < 0.1
    count = lambda m: sum(x.size for x in jax.tree.leaves(jf.functional(m)[1]))
    assert report["parameters"] == [count(model), count(done.model)]
    assert report["parameters"][1] < 0.4 * report["parameters"][0] and report["flops"][1] < 0.5 * report["flops"][0]
    for kind, (before, after) in report["kept"].items():
        assert int(sum(np.sum(np.asarray(m) != 0) for m in jax.tree.leaves(done.masks[kind]))) == after < before or (
            kind == "sublayers" and after <= before
        )
    assert np.isfinite(report["val_loss"]) and all(s > 0 for s in report["latency_seconds"])
    assert model.config.hidden_size == 32  # what was given stays


def test_lambda_grows_while_sparsity_follows_the_target(pruned):
    _, done = pruned
    seen = [record for record in done.history if "lambda_2" in record and "target" in record]
    assert np.all(np.diff([record["lambda_2"] for record in seen]) >= 0) and seen[-1]["lambda_2"] > 0
    assert abs(seen[-1]["sparsity"] - 0.8) < 0.1 and seen[0]["sparsity"] < seen[-1]["sparsity"] - 0.2


def test_cut_and_masked_are_one_before_fine_tuning_and_it_saves(pruned, tmp_path):
    _, done = pruned
    batch = {name: x for name, x in rows(8).items() if name != "labels"}
    apply, params = jf.functional(done.trained)
    small = jf.compact(done.trained, done.masks)
    fewer_apply, fewer = jf.functional(small)
    run = gates.gated(apply, done.trained, tuple(done.masks))
    a, b = jax.jit(lambda p, q, m: (run(p, batch, m).logits, fewer_apply(q, batch).logits))(params, fewer, done.masks)
    assert np.abs(a - b).max() < 1e-5 * max(1, np.abs(a).max())
    jf.save(done.model, tmp_path / "small")
    again, ours = jf.functional(jf.load(tmp_path / "small"))[1], jf.functional(done.model)[1]
    assert tiny.largest_difference(again, ours) == 0


def test_every_seed_brings_a_roberta_to_the_same_sparsity(tmp_path):
    shape = roberta.Config(**ONE, intermediate_size=64, max_position_embeddings=12, initializer_range=0.1,
                           hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    model = jf.init(shape, head="sequence_classification", key=jax.random.key(0))
    config = dataclasses.replace(QUICK, steps=100, check_every=50)
    found = [vib_prune(model, rows(), {"params": 0.4}, config=config, key=jax.random.key(seed)) for seed in (0, 1)]
    for done in found:
        assert abs(done.report["expected_sparsity"] - 0.6) < 0.05 and abs(done.report["actual_sparsity"] - 0.6) < 0.01
        assert all(before > after for before, after in (done.report["kept"][kind] for kind in ("hidden", "ffn")))
    one, other = ({kind: jax.tree.leaves(mine) for kind, mine in done.masks.items()} for done in found)
    assert any(np.any((a != 0) != (b != 0)) for kind in one for a, b in zip(one[kind], other[kind], strict=True))
    jf.save(found[0].model, tmp_path / "small")
    again, ours = jf.functional(jf.load(tmp_path / "small"))[1], jf.functional(found[0].model)[1]
    assert tiny.largest_difference(again, ours) == 0


def test_faster_leaves_the_weights_of_a_llama_and_counts_its_key_heads():
    model = tiny.model("llama", num_key_value_heads=2, intermediate_size=64, initializer_range=0.1, **ONE)
    ids = {"input_ids": rows()["input_ids"]}
    config = dataclasses.replace(QUICK, steps=100)
    done = vib_prune(model, ids, {"flops": 0.6}, mode="faster", units=("hidden", "heads", "ffn"), config=config,
                     key=jax.random.key(0))  # fmt: skip
    assert tiny.largest_difference(jf.functional(done.trained)[1], jf.functional(model)[1]) == 0
    kept = done.report["kept"]
    assert {kind: before for kind, (before, _) in kept.items()} == {"hidden": 32, "heads": 2, "ffn": 64}
    assert abs(done.report["actual_sparsity"] - 0.4) < 0.01 and done.model.config.hidden_size == kept["hidden"][1] < 32
    assert jf.generate(done.model, ids["input_ids"][:1, :3], max_new_tokens=2)[0] is not None


def test_fast_takes_some_rows_and_rounds_widths_of_a_gpt2():
    model = tiny.model("gpt2", initializer_range=0.1, **ONE)
    config = dataclasses.replace(QUICK, steps=300, fast_steps=100, fast_share=0.25, multiple=8, miss=0.2)
    done = vib_prune(model, {"input_ids": rows()["input_ids"]}, {"params": 0.5}, mode="fast", config=config,
                     key=jax.random.key(0))  # fmt: skip
    assert done.report["steps"] == 100
    widths = [int(np.sum(np.asarray(m) != 0)) for m in (done.masks["hidden"], *done.masks["ffn"].values())]
    assert all(width % 8 == 0 for width in widths) and done.report["parameters"][1] < done.report["parameters"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {"params": 0.0}}, "budget: the share of params that stays must lie between 0 and 1, got 0.0"),
        ({"budget": {"flops": 1.2}}, "budget: the share of flops"),
        ({"budget": {"bytes": 0.5}}, "budget: expected {'params': share} or {'flops': share}"),
        ({"budget": {"params": 0.05}, "units": ("heads",)}, r"budget: params 0.05 is below 0\.\d+, what is left"),
        ({"units": ("neurons",)}, "units: expected some of hidden, heads, ffn, layers"),
        ({"mode": "slow"}, "mode: expected full, fast or faster"),
        ({"teacher": classifier(num_labels=3)}, "teacher: its labels are 3, the model's 2"),
        ({"data": {"input_ids": np.ones((4, 8), int)}}, "data: no 'labels'; give them, or a loss"),
        ({"data": {}}, "data: expected rows with 'input_ids'"),
    ],
)
def test_errors_come_before_training(change, message):
    given = {"data": rows(8), "budget": {"params": 0.5}, "units": ("heads", "ffn"), **change}
    with pytest.raises(ValueError, match=message):
        vib_prune(classifier(), given.pop("data"), given.pop("budget"), key=jax.random.key(0), **given)


def test_a_missed_budget_is_no_model():
    with pytest.raises(BudgetMissed, match=r"expect a sparsity of 0\.0\d+, the target is 0\.500"):
        vib_prune(classifier(num_hidden_layers=1), rows(16), {"params": 0.5}, config=VTransConfig(steps=2, batch=8),
                  key=jax.random.key(0))  # fmt: skip


def test_configurations_are_checked():
    for change, message in (({"steps": 0}, "steps: expected 1"), ({"warmup": 0.0}, "warmup: expected a share"),
                            ({"multiple": 0}, "multiple"), ({"mask_rate": 0.0}, "mask_rate")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            VTransConfig(**change)
    with pytest.raises(ValueError, match="temperature"):
        DistilConfig(temperature=0.0)
    assert DistilConfig().chosen(12) == (2, 5, 8, 11) and DistilConfig().chosen(2) == (0, 1)
