"""Curves, their points, lottery tickets and mask similarity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers.compress import lottery_ticket, mask_similarity, prune, sparsity_sweep
from jaxformers.compress.sparsity_curve import essential_sparsity, knee
from jaxformers.weights import masks_of
from tests import tiny

IDS = np.random.default_rng(0).integers(1, 20, (4, 8))


def test_points_and_similarities_of_the_reference(oracles):
    z = np.load(oracles / "essential_sparsity" / "analysis.npz")
    s, metric = z["sparsity"].tolist(), z["metric"].tolist()
    assert essential_sparsity(s, metric, 0.01) == pytest.approx(float(z["essential_sparsity"]))
    assert knee(s, metric) == pytest.approx(float(z["knee"]))
    a, b = {"x": z["keep_a"].T}, {"x": z["keep_b"].T}
    for kind in ("cosine", "jaccard"):
        found = mask_similarity(a, b, kind=kind)
        assert found.overall == found.matrices["x"] == pytest.approx(float(z[kind]), abs=1e-12)


def test_essential_sparsity_is_the_longest_prefix():
    grid = (0, 0.1, 0.2, 0.3)
    assert essential_sparsity(grid, (1, 0.995, 0.97, 1.0), 0.01) == 0.1  # that it comes back later does not count
    assert essential_sparsity(grid, (1, 0.9, 0.9, 0.9), 0.01) == 0.0
    assert essential_sparsity(grid, (1, 1.1, 0.9901, 0.99), 0.01) == 0.3
    assert essential_sparsity(grid, (1, float("nan"), 1, 1), 0.01) == 0.0
    for bad in ((0.1, 0.2), (0.0, 0.0), ()):
        with pytest.raises(ValueError, match="grid that rises from 0"):
            knee(bad, bad)
    with pytest.raises(ValueError, match="tau=-1"):
        essential_sparsity(grid, grid, -1)
    with pytest.raises(ValueError, match="nothing to fall from"):
        essential_sparsity((0.0,), (float("nan"),))


def test_a_sweep_writes_what_it_found(tmp_path):
    model = tiny.model("llama", num_hidden_layers=1)
    seen = []

    def metric(pruned):
        zeros = [np.asarray(jf.weights.dense(m.kernel.get_value())) == 0 for _, m in jf.surgery.find_linears(
            pruned.layers, "**")]  # fmt: skip
        return 1 - np.concatenate([z.ravel() for z in zeros]).mean() ** 2

    def finetune(masked):
        seen.append(masks_of(masked))
        return masked

    grid = (0.0, 0.5, 0.8)
    curves = sparsity_sweep(
        model, metric, methods=("magnitude", "random", "wanda"), grid=grid, finetune=finetune, tau=0.3,
        calibration=IDS, key=jax.random.key(0), directory=tmp_path,
    )  # fmt: skip
    assert [c.method for c in curves] == ["magnitude", "random", "wanda"] and len(seen) == 9
    np.testing.assert_allclose(curves[0].metric, [1, 0.75, 0.36], atol=0.01)
    assert all(c.finetuned and c.essential_sparsity == 0.5 for c in curves[:2])
    found = json.loads((tmp_path / "sparsity.json").read_text())
    assert found["curves"][0]["essential_sparsity"] == 0.5 and "s' <= s" in found["definitions"]["essential_sparsity"]
    lines = (tmp_path / "sparsity.csv").read_text().splitlines()
    assert len(lines) == 10 and lines[1].startswith("magnitude,True,0.0,1.0")
    if pytest.importorskip("matplotlib"):
        assert (tmp_path / "sparsity.png").stat().st_size > 1000


def test_a_ticket_is_found_in_rounds_and_rewound():
    model = tiny.model("llama", num_hidden_layers=1)
    rng = np.random.default_rng(0)
    seen = []

    def train(masked, i):
        """Gives every weight another size: what the last round likes least goes."""
        seen.append({p: np.asarray(m) for p, m in masks_of(masked).items()})
        new = jf.surgery.copy(masked)
        for _, linear in jf.surgery.find_linears(new.layers, "**"):
            kernel = linear.kernel.get_value()
            fresh = jnp.asarray(rng.standard_normal(kernel.shape), jnp.float32)
            linear.kernel.set_value(jf.weights.Masked(fresh, kernel.mask))
        return new

    ticket = lottery_ticket(model, train, rounds=3, share=0.2)
    total = left = sum(m.size for m in seen[0].values())
    for masks, after in zip(seen, [*seen[1:], ticket.masks], strict=True):
        assert sum(int(m.sum()) for m in masks.values()) == left
        left -= round(0.2 * left)
        assert not any(np.any(np.asarray(after[p]) & ~masks[p]) for p in masks)  # what is gone stays gone
    assert ticket.report.sparsity == pytest.approx(1 - left / total) == pytest.approx(1 - 0.8**3, abs=0.01)
    for path, mask in ticket.masks.items():  # the pretrained weights, not the trained ones
        old, new = (dict(jf.surgery.find_linears(m, path))[path].kernel.get_value() for m in (model, ticket.model))
        np.testing.assert_array_equal(new, np.where(np.asarray(mask), old, 0))
    with pytest.raises(ValueError, match="rounds=0"):
        lottery_ticket(model, train, rounds=0)
    with pytest.raises(ValueError, match="share=1"):
        lottery_ticket(model, train, rounds=1, share=1)
    with pytest.raises(ValueError, match="train: it returned another model"):
        lottery_ticket(model, lambda masked, i: tiny.model("llama", num_hidden_layers=2), rounds=1)


def test_similarity_of_equal_random_and_empty_masks():
    ones, none = {"x": np.ones((4, 4), bool)}, {"x": np.zeros((4, 4), bool)}
    assert mask_similarity(ones, ones).overall == 1 == mask_similarity(none, none).overall
    assert mask_similarity(ones, none).overall == 0 == mask_similarity(ones, none, kind="jaccard").overall
    big = {f"layer {i}": np.random.default_rng(i).random((200, 200)) < 0.3 for i in range(2)}
    other = {f"layer {i}": np.random.default_rng(i + 2).random((200, 200)) < 0.3 for i in range(2)}
    assert mask_similarity(big, other).overall == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match=r"different models: y \(None and \(4, 4\)\)"):
        mask_similarity(ones, {**ones, "y": ones["x"]})
    with pytest.raises(ValueError, match="kind='dice'"):
        mask_similarity(ones, ones, kind="dice")


def test_magnitude_and_its_own_masks_agree():
    model = tiny.model("bert", num_hidden_layers=1)
    a, b = prune(model, sparsity=0.3), prune(model, sparsity=0.5)
    assert mask_similarity(a.masks, b.masks).overall == pytest.approx(np.sqrt(0.5 / 0.7), abs=0.01)
