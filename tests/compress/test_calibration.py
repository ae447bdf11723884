"""The calibration pass: parts of a model run apart give what the whole gives; statistics; bad data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers.compress import calibration, hessian
from tests import tiny

IDS = np.random.default_rng(0).integers(1, 20, (5, 6))


def logits(model, batch):
    apply, params = jf.functional(model)
    return np.asarray(apply(params, batch).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_parts_give_what_the_whole_gives(name):
    model = tiny.model(name)
    mask = np.ones_like(IDS)
    mask[-1, 4:] = 0
    batch = calibration.checked_calibration(model, {"input_ids": IDS, "attention_mask": mask})
    batches = calibration.first_inputs(model, batch, 2)
    assert [len(x) for x, _, _ in batches] == [2, 2, 1]
    halves = calibration.run_blocks(model, calibration.run_blocks(model, batches, stop=1), start=1)
    finish = calibration.after_blocks(model)
    found = [
        finish(x, {k: v[2 * i : 2 * i + 2] for k, v in batch.items()}).logits for i, (x, _, _) in enumerate(halves)
    ]
    np.testing.assert_allclose(np.concatenate(found), logits(model, batch), atol=2e-5)
    without = calibration.run_blocks(model, calibration.run_blocks(model, batches, 0, 1), 2)  # block 1 left out
    assert np.abs(without[0][0] - halves[0][0]).max() > 1e-3
    with pytest.raises(ValueError, match="stop"):
        calibration.run_blocks(model, batches, 2, 1)


def test_a_changed_block_feeds_the_next_and_the_old_model_stays():
    model = tiny.model("llama")
    batches = calibration.first_inputs(model, calibration.checked_calibration(model, IDS), 5)
    seen = []

    def double(i, block, batches):
        seen.append(batches[0][0])
        kernel = 2 * block.mlp.up.kernel.get_value()
        block.mlp.up.kernel.set_value(kernel)
        return {"mlp.up": kernel}

    new = calibration.through_blocks(model, batches, double)
    old = np.asarray(model.layers[1].mlp.up.kernel.get_value())
    np.testing.assert_array_equal(new.layers[1].mlp.up.kernel.get_value(), 2 * old)
    for i, x in enumerate(seen):
        np.testing.assert_allclose(x, calibration.run_blocks(new, batches, 0, i)[0][0], atol=1e-6)
    assert np.abs(seen[1] - calibration.run_blocks(model, batches, 0, 1)[0][0]).max() > 1e-3


def test_norms_are_half_the_diagonal_of_the_hessian_and_padding_does_not_count():
    model = tiny.model("llama")
    mask = np.ones_like(IDS)
    mask[2:, 3:] = 0
    batches = calibration.first_inputs(model, {"input_ids": IDS, "attention_mask": mask}, 2)
    block = calibration.on_device(model.layers[0])
    groups = calibration.shared_inputs(block, *batches[0][:2], list(calibration.linears_of(block)))
    assert groups[0] == ("attention.query", "attention.key", "attention.value") and len(groups) == 4
    norms = calibration.collect(block, batches, groups, hessian.accumulate_norms, 1)
    grams = calibration.collect(block, batches, groups, hessian.accumulate, 2)
    for n, H in zip(norms, grams, strict=True):
        np.testing.assert_allclose(n, np.diagonal(H) / 2, rtol=1e-5)
    garbage = np.where(mask == 1, IDS, 7)
    others = calibration.first_inputs(model, {"input_ids": garbage, "attention_mask": mask}, 3)
    again = calibration.collect(block, others, groups, hessian.accumulate_norms, 1)
    for a, b in zip(norms, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_running_norms_equal_the_definition():
    x = np.random.default_rng(0).standard_normal((7, 5, 3)).astype(np.float32)
    norms, seen = hessian.accumulate_norms(jnp.zeros(3), 0, x[:3])
    norms, seen = hessian.accumulate_norms(norms, seen, x[3:])
    assert seen == 7
    np.testing.assert_allclose(norms, (x**2).sum((0, 1)) / 7, rtol=1e-6)


def test_errors():
    model = tiny.model("llama")
    cases = {
        "integer token ids": IDS[0],
        "vocabulary": IDS + 20,
        "attention_mask has 2 samples": {"input_ids": IDS, "attention_mask": np.ones((2, 6))},
        "got nothing": {},
    }
    for message, data in cases.items():
        with pytest.raises(ValueError, match=message):
            calibration.checked_calibration(model, data)
    with pytest.raises(ValueError, match="batch_size"):
        calibration.first_inputs(model, {"input_ids": IDS}, 0)
    beit = {"model_type": "beit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "image_size": 8, "patch_size": 4, "num_channels": 3}  # fmt: skip
    images = jf.init(beit, key=jax.random.key(0))
    batch = calibration.checked_calibration(images, {"pixel_values": np.zeros((2, 3, 8, 8), np.float32)})
    with pytest.raises(ValueError, match="grid"):
        calibration.first_inputs(images, batch, 2)
