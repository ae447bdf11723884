"""Models without what masks removed: equal to the masked ones, saved, reloaded, scanned, generated from."""


import jax
import numpy as np
import pytest
import tiny_gates

import jaxformers as jf
from jaxformers import compaction, gates, nn, paths


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
    assert compaction.settings(again) == compaction.settings(small)
    a, b = (paths.flatten(jf.functional(m)[1]) for m in (small, again))
    assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)
