"""The pattern language, and trees cut by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformers import paths
from jaxformers.weights import LowRank


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("layers.*.mlp.up", "layers.3.mlp.up", True),
        ("layers.*.mlp.up", "layers.3.mlp.up.kernel", False),
        ("layers.*.mlp.up", "decoder.layers.3.mlp.up", False),
        ("layers.*", "layers.3.mlp", False),
        ("layers.**", "layers.3.mlp.up", True),
        ("layers.**", "layers", True),
        ("layers.**", "layersx.3", False),
        ("**.bias", "bias", True),
        ("**.bias", "layers.0.mlp.up.bias", True),
        ("**.bias", "layers.0.mlp.unbias", False),
        ("**", "anything.at.all", True),
        ("**.{query,value}.kernel", "layers.0.attention.value.kernel", True),
        ("**.{query,value}.kernel", "layers.0.attention.key.kernel", False),
        ("layers.{0,1}.mlp", "layers.10.mlp", False),
        ("layers.1*.mlp", "layers.10.mlp", True),
        ("**embeddings.token.embedding", "encoder.embeddings.token.embedding", True),
        ("layers.*.*_norm", "layers.0.mlp_norm", True),
        ("layers.**.kernel", "layers.kernel", True),
        ("a.**.b", "a.b", True),
        ("a.**.b", "a.x.y.b", True),
        ("a+b.(c)", "a+b.(c)", True),
        ("layers.?", "layers.0", False),
    ],
)
def test_matches(pattern, path, hit):
    assert paths.matches(pattern, path) is hit


def test_several_patterns_and_bad_ones():
    assert paths.matches(("a", "b.*"), "b.c")
    assert not paths.matches((), "a")
    with pytest.raises(ValueError, match="is not closed"):
        paths.matches("layers.{0,1", "layers.0")
    with pytest.raises(ValueError, match="expected text"):
        paths.matches([1], "a")


names = st.text("abcxyz_0123456789", min_size=1, max_size=4)
trees = st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=12)


@given(st.dictionaries(names, trees, max_size=4))
def test_unflatten_is_the_inverse_of_flatten(tree):
    flat = paths.flatten(tree)
    assert paths.unflatten(flat) == tree
    assert all(paths.matches(path, path) and paths.matches("**", path) for path in flat)


@pytest.fixture
def params():
    low = LowRank(jnp.ones((4, 6)), jnp.ones((4, 2)), jnp.ones((2, 6)), 0.5)
    layer = {"up": {"kernel": low, "bias": jnp.zeros(6)}, "down": {"kernel": jnp.ones((6, 4))}}
    return {"layers": {"0": layer}, "norm": {"scale": jnp.ones(4)}}


def test_a_typed_weight_is_one_leaf_with_arrays_of_its_own(params):
    assert set(paths.flatten(params)) == {
        "layers.0.up.kernel", "layers.0.up.bias", "layers.0.down.kernel", "norm.scale",
    }  # fmt: skip
    assert paths.select(params, "**.kernel.{a,b}") == ["layers.0.up.kernel.a", "layers.0.up.kernel.b"]
    whole = paths.select(params, "**.up.kernel")
    assert [p.rpartition(".")[2] for p in whole] == ["base", "a", "b"]
    with pytest.raises(ValueError, match="no parameter matches; there are layers.0"):
        paths.select(params, "layers.1.**")


def test_mask_has_the_structure_of_the_params(params):
    chosen = paths.mask(params, "**.kernel.a")
    assert jax.tree.structure(chosen) == jax.tree.structure(params)
    assert sum(jax.tree.leaves(chosen)) == 1
    assert chosen["layers"]["0"]["up"]["kernel"].a is True


def test_partition_and_combine(params):
    ours, rest = paths.partition(params, "**.kernel.{a,b}")
    assert len(jax.tree.leaves(ours)) == 2
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(params)) - 2
    joined = paths.combine(ours, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))

    def loss(ours):
        return paths.combine(ours, rest)["layers"]["0"]["up"]["kernel"].dense().sum()

    grads = jax.grad(loss)(ours)
    assert np.allclose(jax.tree.leaves(grads)[0], 0.5 * 6)


def test_report_counts_logical_entries(params):
    text = paths.report(params, trainable="**.bias")
    assert "58 parameters, 6 trainable (10.34 %)" in text
    assert text.count("frozen") == 3
