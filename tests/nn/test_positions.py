"""Rotary positions and relative buckets against values frozen from Hugging Face (tests/live/freeze.py)."""

import json

import numpy as np
import pytest

from jaxformers import nn

KINDS = ("default", "linear", "dynamic", "yarn", "yarn-options", "yarn-attention", "llama3")


@pytest.fixture(scope="module")
def frozen(oracles):
    with np.load(oracles / "nn" / "rotary.npz") as z:
        return dict(z)


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("kind", KINDS)
def test_rotary_table(kind, layout, frozen):
    config = json.loads(str(frozen[f"{kind}.config"]))
    if layout == "old":
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else rope
    rotary = nn.rotary_from_hf(config, config["head_dim"])
    for part, positions in (("", frozen["positions"]), ("short_", frozen["short"])):
        cos, sin = nn.rotary_table(rotary, positions)
        half = cos.shape[-1]
        assert np.abs(cos - frozen[f"{kind}.{part}cos"][..., :half]).max() < 1e-5
        assert np.abs(sin - frozen[f"{kind}.{part}sin"][..., :half]).max() < 1e-5


@pytest.mark.parametrize(("interleaved", "name"), [(False, "halves"), (True, "interleaved")])
def test_rotation_in_both_layouts(interleaved, name, frozen):
    x = frozen["x"]
    rotary = nn.Rotary(x.shape[-1], interleaved=interleaved)
    table = nn.rotary_table(rotary, frozen["positions"][:, : x.shape[1]])
    assert np.abs(nn.rotate(x, table, interleaved) - frozen[name]).max() < 1e-5


def test_part_of_a_head_may_be_rotated(frozen):
    x = frozen["x"]
    table = nn.rotary_table(nn.Rotary(4), np.arange(x.shape[1])[None])
    turned = nn.rotate(x, table, False)
    assert np.array_equal(turned[..., 4:], x[..., 4:])
    assert np.allclose(nn.rotate(x[..., :4], table, False), turned[..., :4])


def test_rotation_depends_on_distance_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def score(i, j):
        tables = [nn.rotary_table(nn.Rotary(8), np.array([[p]])) for p in (i, j)]
        return float((nn.rotate(q, tables[0], False) * nn.rotate(k, tables[1], False)).sum())

    assert score(3, 1) == pytest.approx(score(13, 11), abs=1e-5)


@pytest.mark.parametrize(("bidirectional", "name"), [(True, "buckets_both"), (False, "buckets_past")])
def test_relative_buckets(bidirectional, name, frozen):
    found = nn.relative_buckets(np.zeros(1, int), np.arange(-300, 301), bidirectional=bidirectional)
    assert np.array_equal(found[0], frozen[name])
    square = nn.relative_buckets(np.arange(5), np.arange(5), bidirectional=bidirectional)
    assert np.array_equal(square[3], nn.relative_buckets(np.arange(3, 4), np.arange(5), bidirectional=bidirectional)[0])


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="rope type 'longrope' is not supported; supported are default"):
        nn.rotary_from_hf({"rope_scaling": {"type": "longrope"}}, 8)
    with pytest.raises(ValueError, match="even number"):
        nn.Rotary(7)
