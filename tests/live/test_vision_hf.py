"""Vision models against Hugging Face itself: files both ways equal to the bit, and every parameter's gradient."""

import jax
import numpy as np
import pytest
from models.test_vision_variants import cases, loss
from parity import assert_close_scaled, grads_by_hf_name
from safetensors.numpy import load_file

import jaxformers as jf

torch = pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")

from live import freeze_vision  # noqa: E402


@pytest.mark.parametrize("name", freeze_vision.VARIANTS)
def test_hugging_face_reads_what_is_written_here(name, oracles, tmp_path):
    theirs = freeze_vision.build(name)
    folder = oracles / "vision" / name
    jf.save(jf.load(folder), tmp_path / "x")
    again, report = type(theirs).from_pretrained(tmp_path / "x", attn_implementation="eager", output_loading_info=True)
    counter = {key for key in theirs.state_dict() if key.endswith("num_batches_tracked")}  # counts nothing here
    assert set(report["missing_keys"]) <= counter and not report["unexpected_keys"] and not report["mismatched_keys"]
    # what Hugging Face makes of its own file: beit-mim's two norms come back as one
    before, after = type(theirs).from_pretrained(folder).state_dict(), again.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for i, (batch, expected) in enumerate(cases(folder)):
        for model in (theirs,) if name == "beit-mim" else (theirs, again.eval()):
            found = freeze_vision.run(model, batch, i > 0)
            assert found.keys() == expected.keys()
            for part, value in expected.items():
                assert_close_scaled(found[part], value, 1e-5)


@pytest.mark.parametrize("name", freeze_vision.VARIANTS)
def test_gradients_of_all_parameters(name, oracles, tmp_path):
    folder = oracles / "vision" / name
    theirs, model = freeze_vision.build(name), jf.load(folder)
    batch, expected = cases(folder)[0]
    parts = [part for part in ("loss", "logits", "pooler_output", "last_hidden_state") if part in expected]
    weights = np.random.default_rng(0).standard_normal(expected[parts[0]].shape).astype(np.float32)
    out = theirs(**{key: torch.from_numpy(value) for key, value in batch.items()})
    (out[parts[0]] * torch.from_numpy(weights)).sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        theirs.save_pretrained(tmp_path)  # gradients under the names of the files
    apply, params = jf.functional(model)

    def scalar(params):
        out = apply(params, {key: value for key, value in batch.items() if key != "labels"})
        if parts[0] == "loss":
            return loss(model, batch, out) * weights
        ours = {"logits": "logits", "pooler_output": "pooled", "last_hidden_state": "last_hidden_state"}[parts[0]]
        found = getattr(out, ours)
        shaped = weights if weights.shape == found.shape else np.moveaxis(weights, 1, -1).reshape(found.shape)
        return (found * shaped).sum()

    grads = grads_by_hf_name(model, jax.jit(jax.grad(scalar))(params))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    found = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.endswith(statistics)}
    scale = max(np.abs(value).max() for value in found.values())
    for key, value in found.items():
        # a key's bias moves all scores of a query alike: its gradient is 0, and what both have of it is rounding
        limit = 1e-4 * np.abs(value).max() + 1e-7 * scale
        error = np.abs(grads[key.replace("decoder_encoder.layer", "decoder_layers")] - value).max()
        assert error <= limit, f"{key}: {error} > {limit}"
