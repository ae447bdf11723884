"""Models of images and texts against tiny Hugging Face models frozen by tests/live/freeze_mixed.py: every class."""

import jax
import numpy as np
import pytest
from parity import assert_close_scaled, run
from safetensors.numpy import load_file

import jaxformers as jf
from jaxformers import nn

NAMES = (
    "clip-labels", "clip-legacy", "clip-stretched", "clip-text", "clip-text-projection", "clip-vision",
    "clip-vision-projection", "llava-base", "llava-gpt2", "llava-mistral", "llava-tied",
    "ved-beit-bert", "ved-gpt2", "ved-roberta", "ved-trocr-sines",
)  # fmt: skip


def read(folder):
    """(inputs, outputs) of an oracle folder."""
    with np.load(folder / "io.npz") as z:
        return tuple({n[len(k) :]: z[n] for n in z.files if n.startswith(k)} for k in ("in.", "out."))


def part(out: nn.Output, name: str):
    """What Hugging Face calls ``name`` in its output."""
    own, _, rest = name.partition(".")
    if rest:
        return part(out.extra[own], rest)
    if name in (out.extra or {}):
        return out.extra[name]
    return getattr(out, {"pooler_output": "pooled", "logits_per_image": "logits"}.get(name, name))


def real(name, array, inputs):
    """Which entries of an output are defined: states of padding are not."""
    mask = inputs.get("attention_mask", inputs.get("decoder_attention_mask"))
    if mask is None or array.ndim < 3 or array.shape[:2] != mask.shape:
        return None
    return mask == 1


def greedy(model, inputs, steps):
    if "input_ids" not in inputs:
        return jf.generate(model, pixel_values=inputs["pixel_values"], max_new_tokens=steps, eos_token_id=())
    prompts = [row[mask == 1].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    return jf.generate(
        model, prompts, max_new_tokens=steps, pixel_values=inputs["pixel_values"], eos_token_id=()
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_equals_hugging_face_and_survives_a_round_trip(name, oracles, tmp_path):
    folder = oracles / "mixed" / name
    model, (inputs, expected) = jf.load(folder), read(folder)
    assert expected
    out = run(model, inputs)
    for key, value in expected.items():
        if key == "generated":
            assert greedy(model, inputs, value.shape[1]) == value.tolist()
            continue
        assert_close_scaled(part(out, key), value, 2e-5, real(key, value, inputs))

    jf.save(model, tmp_path / "copy")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "copy"))
    if "decoder.lm_head.decoder.bias" in before:  # then Hugging Face keeps a second bias that nothing reads
        before.pop("decoder.lm_head.bias")
    assert set(before) == set(after)
    assert all(np.array_equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


@pytest.mark.parametrize("name", NAMES)
def test_scanned_layers_are_the_same_model_with_the_same_sites(name, oracles):
    folder = oracles / "mixed" / name
    model, (inputs, _) = jf.load(folder), read(folder)
    results = []
    for scan in (False, True):
        apply, params = jf.functional(model, scan_layers=scan)
        results.append(jax.jit(jf.reap(apply, "**.attention.probs"))(params, inputs))
    for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert set(results[0][1]) == set(results[1][1])
    assert len(results[0][1]) >= 2
