"""Rotary positions and relative buckets against Hugging Face's own functions."""

import numpy as np
import pytest

from jaxformers import nn

pytest.importorskip("torch", reason="live comparison: pip install 'jaxformers[oracle]'")
pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")

from live import freeze  # noqa: E402


@pytest.mark.parametrize("kind", freeze.ROPES)
@pytest.mark.parametrize("positions", [np.arange(40)[None], freeze.positions(), np.array([[5, 900, 31, 0]])])
def test_rotary_table(kind, positions):
    config = freeze.rope_config(kind)
    cos, sin = nn.rotary_table(nn.rotary_from_hf(config, freeze.HEAD), positions)
    expected = freeze.rope(kind, positions)
    for found, whole in zip((cos, sin), expected, strict=True):
        # an angle of 900 radians has a rounding error of 900 · 2⁻²⁴
        assert np.abs(np.concatenate([found, found], axis=-1) - whole).max() < (1e-4 if positions.max() > 100 else 1e-5)


@pytest.mark.parametrize("kind", freeze.ROPES)
def test_settings_written_here_mean_the_same_there(kind):
    import torch
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = freeze.rope_config(kind)
    rotary = nn.rotary_from_hf(config, freeze.HEAD)
    table = LlamaRotaryEmbedding(LlamaConfig(**{**config, "rope_parameters": nn.rotary_to_hf(rotary)}))
    positions = freeze.positions()
    cos, _ = table(torch.zeros(1), torch.from_numpy(positions))
    assert np.abs(cos.numpy() - freeze.rope(kind, positions)[0]).max() < 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(interleaved):
    x = np.random.default_rng(1).standard_normal((2, 9, 3, freeze.HEAD)).astype(np.float32)
    positions = freeze.positions()[:, :9]
    table = nn.rotary_table(nn.Rotary(freeze.HEAD), positions)
    cos, sin = freeze.rope("default", positions)
    assert np.abs(nn.rotate(x, table, interleaved) - freeze.rotate(x, cos, sin, interleaved)).max() < 1e-5


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_buckets(bidirectional):
    found = nn.relative_buckets(np.zeros(1, int), np.arange(-300, 301), bidirectional=bidirectional)
    assert np.array_equal(found[0], freeze.buckets(bidirectional))
