"""What schedules cost, the masked simulation against models that really prune, and the search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers.compress import zero_tprune as zt
from jaxformers.compress import zero_tprune_search as zs
from jaxformers.compress.zero_tprune import Options, Stage

CONFIG = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 24, "patch_size": 4, "num_labels": 5, "initializer_range": 0.3,
}  # fmt: skip
IMAGES = np.random.default_rng(0).standard_normal((3, 3, 24, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def vit():
    return jf.init(CONFIG, head="image_classification", key=jax.random.key(1))


def abstract(config, head="image_classification"):
    return jf.surgery.named(nnx.eval_shape(lambda: jf.init(config, head=head, key=jax.random.key(0))))


def test_the_schedule_of_deit_s_costs_3_1_gmacs():
    model = abstract({
        "model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
        "intermediate_size": 1536, "num_labels": 1000,
    })  # fmt: skip
    dense, pruned = zs.macs(model), zs.macs(model, zt.DEIT_S)
    assert round(dense / 1e9, 1) == 4.6 and round(pruned / 1e9, 1) == 3.1
    left, by_hand = 196, 196 * 768 * 384 + 384 * 1000
    plan = {stage.block: stage for stage in zt.DEIT_S}
    for block in range(1, 13):
        n = left + 1
        by_hand += 12 * n * 384**2 + 2 * n**2 * 384
        if block in plan:
            left = int(np.floor(plan[block].keep_rate * (left - plan[block].remove) + 1e-9))
    assert pruned == by_hand
    apply, params = zt.pruner(model)
    images = {"pixel_values": jax.ShapeDtypeStruct((1, 3, 224, 224), jnp.float32)}
    whole = jf.cost(lambda p, b: apply(p, b, zt.DEIT_S).output.logits, params, images).macs
    assert pruned < whole < 1.02 * pruned  # choosing tokens is cheap, as the paper says


def test_one_keep_rate_for_a_budget():
    model = abstract({**CONFIG, "num_hidden_layers": 12})
    schedule = zs.uniform_schedule(model, 0.65)
    assert [stage.block for stage in schedule] == [1, 4, 6, 8, 11] and len({s.keep_rate for s in schedule}) == 1
    assert [stage.votes for stage in schedule] == [30, 5, 5, 5, 1] and schedule[0].remove == 1
    dearer = tuple(Stage(s.block, s.remove, s.keep_rate + 0.01, s.votes) for s in schedule)
    assert zs.macs(model, schedule) <= 0.65 * zs.macs(model) < zs.macs(model, dearer) * 1.02
    with pytest.raises(ValueError, match="budget: no keep rate behind blocks"):
        zs.uniform_schedule(model, 0.01)


def test_votes_by_depth():
    assert [zs.votes_at(block, 12) for block in range(1, 13)] == [30] * 3 + [5] * 6 + [1] * 3


def test_masking_tokens_is_pruning_them(vit):
    """One program, numbers traced, gives the logits of models that drop the tokens."""
    options = Options()
    apply, params = zs.simulator(vit, (1, 2))
    run = jax.jit(
        lambda numbers: apply(params, {"pixel_values": IMAGES}, numbers, options=options, key=jax.random.key(0))
    )
    for schedule in ((Stage(1, 4, 0.9, 8), Stage(2, 3, 0.6, 2)), (Stage(2, 6, 0.5, 1),)):
        real = zt.prune_tokens(vit, IMAGES, schedule, options).output.logits
        np.testing.assert_allclose(run(zs.counts_of(schedule, (1, 2), 36)), real, rtol=0, atol=2e-5)
    assert run._cache_size() == 1


def test_search_keeps_to_the_budget_and_returns_the_best(vit):
    images = np.random.default_rng(1).standard_normal((10, 3, 24, 24)).astype(np.float32)
    trials = []
    best = zs.search(vit, images, budget=0.7, slack=0.2, trials=4, batch_size=5, key=jax.random.key(0), report=trials)
    dense = zs.macs(vit)
    assert len(trials) == 4 == len({t.schedule for t in trials})
    for trial in trials:
        assert 0.5 * dense <= trial.macs == zs.macs(vit, trial.schedule) <= 0.7 * dense
        assert all(stage.block in (1, 2) for stage in trial.schedule)
    assert best == zs.pareto(trials) and set(best) <= set(trials)
    assert all(not any(t.macs <= b.macs and t.accuracy > b.accuracy for t in trials) for b in best)
    whole = zt.prune_tokens(vit, images, ()).output.logits.argmax(-1)  # without labels: agreement with the dense model
    pruned = zt.prune_tokens(vit, images, best[-1].schedule).output.logits.argmax(-1)
    assert best[-1].accuracy == pytest.approx(float((whole == pruned).mean()))


def test_a_report_counts_and_times_both(vit):
    found = zs.measure(vit, IMAGES, (Stage(1, 6, 0.4, 2),), repeats=2, warmup=1)
    assert found.dense.macs == 3 * zs.macs(vit) and 0.2 < found.macs_saved < 0.7
    assert found.dense_latency.batch == 3 and found.speedup > 0
    assert "fewer MACs" in str(found) and "images/s" in str(found)


def test_what_the_search_refuses(vit):
    key = jax.random.key(0)
    for options, message in (
        ({"budget": 1.5}, "budget"), ({"budget": 0.5, "trials": 0}, "a trial"),
        ({"budget": 0.5, "slack": 0.6}, "slack"),
        ({"budget": 0.5, "blocks": (0, 1)}, "blocks: expected some of 1 to 3"),
        ({"budget": 0.05, "slack": 0.01, "trials": 1}, "no schedule drawn"),
        ({"budget": 0.5, "labels": np.zeros(2)}, "labels: expected one for each image, got 2 for 3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            zs.search(vit, IMAGES, **{"key": key, **options})
    dino = abstract({**CONFIG, "model_type": "dinov2", "mlp_ratio": 2})
    with pytest.raises(ValueError, match="DINOv2 has no classifier of the class token alone"):
        zs.search(dino, IMAGES, budget=0.5, key=key)
