"""Models without what masks removed: equal to the masked ones, saved, reloaded, scanned, generated from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_gates

import jaxformers as jf
from jaxformers import compaction, compaction_config, gates, nn, paths
from jaxformers.models import gpt_neo, mistral


def both(model, masks, batch, **options):
    """(gated outputs, compacted outputs, compacted model), compiled together."""
    small = jf.compact(model, masks, **options)
    (apply, params), (own, fewer) = jf.functional(model), jf.functional(small)
    run = gates.gated(apply, model, tuple(masks))
    masked, cut = jax.jit(lambda p, q, m: (run(p, batch, m), own(q, batch)))(params, fewer, masks)
    return masked, cut, small


def assert_equal_outputs(masked, cut, stay=None):
    """Logits to 1e-5 of their scale, hidden states likewise at the units that stay."""
    compared = 0
    for name in ("logits", "pooled", "last_hidden_state"):
        a, b = getattr(masked, name), getattr(cut, name)
        if a is None:
            assert b is None
            continue
        a = a[..., stay] if a.shape[-1] != b.shape[-1] else a
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 2e-5 * max(1.0, float(np.abs(a).max())), name
        compared += 1
    assert compared


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(jf.functional(model)[1]))


@pytest.mark.parametrize("name", tiny_gates.FAMILIES)
def test_equals_the_masked_model_and_survives_a_round_trip(name, oracles, tmp_path):
    model, batch = tiny_gates.load(oracles, name)
    tied = isinstance(model.head, nn.CausalLMHead) and model.head.decoder is None
    masks = tiny_gates.masks(model)
    assert set(masks) >= {"heads", "ffn", "sublayers", "hidden"}
    masked, cut, small = both(model, masks, batch)
    if tied and masked.logits is not None:  # the last norm takes back what the table took up
        masked, cut = (nn.Output(logits=out.logits) for out in (masked, cut))
    assert_equal_outputs(masked, cut, np.flatnonzero(masks["hidden"]))
    assert count(small) < 0.8 * count(model)
    jf.save(small, tmp_path / "small")
    again = jf.load(tmp_path / "small")
    assert compaction_config.settings(again) == compaction_config.settings(small)
    assert again.surgery == small.surgery  # so that it can be saved again
    a, b = (paths.flatten(jf.functional(m)[1]) for m in (small, again))
    assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def half(model, kinds=("heads", "ffn"), keep=lambda n: n // 2):
    """Masks that keep the last of the units of ``kinds``, equally many in each layer."""
    cut = lambda mask: mask.at[: mask.size - keep(mask.size)].set(0)
    return jax.tree.map(cut, gates.ones(model, kinds))


def test_equal_widths_become_a_config_that_says_them(tmp_path):
    model = tiny.model("llama", num_attention_heads=4, num_key_value_heads=2)
    masks = half(model, ("heads", "ffn", "hidden"))
    masks["sublayers"] = {f"layers.1.{part}": jnp.zeros(()) for part in ("attention", "mlp")}
    masked, cut, small = both(model, masks, tiny.batch())
    assert np.abs(masked.logits - cut.logits).max() < 1e-5
    c = small.config
    assert (c.hidden_size, c.intermediate_size, c.num_hidden_layers) == (4, 6, 2)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_size) == (2, 1, 2)
    assert small.surgery == () and model.config.hidden_size == 8  # the old model is untouched
    jf.save(small, tmp_path / "small")
    assert "jaxformers" not in json.loads((tmp_path / "small" / "config.json").read_text())
    apply, params = jf.functional(jf.load(tmp_path / "small"), scan_layers=True)  # equal layers scan
    assert np.abs(jax.jit(apply)(params, tiny.batch()).logits - cut.logits).max() < 1e-5


def test_nothing_masked_changes_nothing():
    model = tiny.model("bert")
    small = jf.compact(model, gates.ones(model))
    assert small.config == model.config and small.surgery == ()
    assert tiny.largest_difference(jf.functional(small)[1], jf.functional(model)[1]) == 0


def test_uniform_pads_with_zeros_what_a_config_can_say():
    model = tiny.model("bert")
    masks = gates.ones(model, ("ffn", "sublayers"))
    for i, n in enumerate((3, 7, 0)):
        masks["ffn"][f"layers.{i}.mlp"] = (jnp.arange(12) < n).astype(jnp.float32)
    masks["sublayers"]["layers.0.attention"] = jnp.zeros(())
    _, uneven, small = both(model, masks, tiny.batch())
    masked, cut, even = both(model, masks, tiny.batch(), uniform=True)
    assert np.abs(masked.logits - cut.logits).max() < 1e-5 and np.abs(uneven.logits - cut.logits).max() < 1e-5
    assert even.config.intermediate_size == 7 and even.surgery == () and small.surgery
    with pytest.raises(ValueError, match="uniform: a config of Bert has no words for these widths"):
        jf.compact(model, half(model, ("hidden",)), uniform=True)


def test_blocks_without_anything_go_and_those_that_differ_by_place_are_recorded(tmp_path):
    config = mistral.Config(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=12, max_position_embeddings=12, sliding_window=3, initializer_range=0.4,
    )  # fmt: skip
    gone = {"sublayers": {f"layers.0.{part}": jnp.zeros(()) for part in ("attention", "mlp")}}
    for model in (jf.init(config, head="causal_lm", key=jax.random.key(0)), tiny.model("gpt2")):
        masked, cut, small = both(model, gone, tiny.batch())
        assert np.abs(masked.logits - cut.logits).max() < 1e-5
        assert len(small.layers) == len(model.layers) - 1 == small.config.num_hidden_layers
    neo = gpt_neo.Config(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=12,
        window_size=2, attention_layers=("global", "local", "global"), initializer_range=0.4,
    )  # fmt: skip
    masked, cut, small = both(jf.init(neo, head="causal_lm", key=jax.random.key(0)), gone, tiny.batch())
    assert np.abs(masked.logits - cut.logits).max() < 1e-5
    jf.save(small, tmp_path / "small")
    apply, params = jf.functional(jf.load(tmp_path / "small"))
    assert np.abs(jax.jit(apply)(params, tiny.batch()).logits - cut.logits).max() < 1e-6


def test_generates_with_a_cache_what_it_would_without(tmp_path):
    model = tiny.model("llama", num_attention_heads=4, num_key_value_heads=2)
    masks = tiny_gates.masks(model)
    jf.save(jf.compact(model, masks), tmp_path / "small")
    small = jf.load(tmp_path / "small")
    ids = np.asarray([[3, 4, 5]])
    found = np.asarray(jf.generate(small, ids, max_new_tokens=5, temperature=0.0))[0]
    apply, params = jf.functional(model)
    run = jax.jit(gates.gated(apply, model))
    whole = np.concatenate([ids[0], found[-5:]])
    logits = run(params, {"input_ids": whole[None]}, masks).logits[0]
    assert logits[2:-1].argmax(-1).tolist() == found[-5:].tolist()


def test_pruned_then_packed_in_four_bits_survives_a_round_trip(tmp_path):
    model = tiny.model("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64,
                       num_hidden_layers=2, initializer_range=0.1)  # fmt: skip
    by_size = lambda w: (w >= np.sort(w)[w.size // 2]).astype(np.float32)
    size = lambda i: np.abs(np.asarray(model.layers[i].mlp.down.kernel.get_value())).sum(1)
    masks = {"ffn": {"layers.0.mlp": by_size(size(0))}, "heads": {"layers.1.attention": jnp.asarray([1, 0, 1, 0])}}
    small = jf.compact(model, masks)  # layers of unequal widths: surgery
    assert small.surgery and small.layers[0].mlp.up.kernel.get_value().shape == (64, 32)
    ids = np.random.default_rng(0).integers(0, 20, (8, 12))
    packed = jf.compress.gptq(small, ids, bits=4, group_size=32)
    jf.save(packed, tmp_path / "packed")
    again = jf.load(tmp_path / "packed")
    a, b = (jax.jit(apply)(params, tiny.batch()).logits for apply, params in map(jf.functional, (packed, again)))
    assert np.array_equal(a, b)
    apply, params = jf.functional(small)
    assert np.abs(a - jax.jit(apply)(params, tiny.batch()).logits).max() < 0.5 * np.abs(a).max()
    with pytest.raises(ValueError, match="is a PackedWeight; compact plain weights"):
        jf.compact(packed, half(packed))


def test_errors():
    model = tiny.model("bert")
    with pytest.raises(ValueError, match=r"masks\['hidden'\]: all units are masked"):
        jf.compact(model, {"hidden": jnp.zeros(8)})
    with pytest.raises(ValueError, match="masks: expected"):
        jf.compact(model, {})
    with pytest.raises(ValueError, match=r"the model has no 'layers.9.mlp'"):
        jf.compact(model, {"ffn": {"layers.9.mlp": jnp.ones(12)}})
    lora = jf.weights.add_lora(model, "layers.*.mlp.up", rank=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match="layers.0.mlp.up.kernel is a LowRank"):
        jf.compact(lora, half(lora))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {"layers.0.attention": [5]}}, r"surgery keeps heads layers.0.attention \[5\], of 2"),
        ({"ffn": {"layers.8.mlp": 3}}, "surgery keeps ffn layers.8.mlp 3, of 0"),
        ({"ffn": {"layers.0.mlp": 10**15}}, "surgery keeps ffn layers.0.mlp 1000000000000000, of 12"),
        ({"hidden": 100}, "surgery keeps hidden 100, of 8"),
        ({"hidden": "8"}, "surgery keeps hidden 8, of 8"),
        ({"removed": {"layers.0": False}}, "surgery removes layers.0, which the model does not have"),
        ({"blocks": {"layers": [0, 7]}}, r"surgery keeps blocks \[0, 7\] of layers, which has 3"),
        ({"blocks": {"pooler": [0]}}, r"surgery keeps blocks \[0\] of pooler, which has 0"),
    ],
)
def test_a_record_that_asks_for_what_is_not_there(change, message):
    nothing = {"heads": {}, "ffn": {}, "hidden": None, "embeddings": None, "removed": {}, "blocks": {}}
    with pytest.raises(ValueError, match=message):
        compaction.abstract_compact(tiny.model("bert"), **{**nothing, **change})
