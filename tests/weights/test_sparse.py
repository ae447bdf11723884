"""Masks and N:M weights on models: values, files, records of surgery, training, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import jaxformers as jf
from jaxformers import weights
from jaxformers.compress import prune
from jaxformers.weights import NMSparse
from jaxformers.weights.sparse import pack_kernel


def logits(model):
    apply, params = jf.functional(model)
    return np.asarray(jax.jit(apply)(params, tiny.batch()).logits)


def two_four(rows=16, outs=5, seed=0):
    kernel = np.random.default_rng(seed).standard_normal((rows, outs)).astype(np.float32)
    groups = np.abs(kernel).reshape(-1, 4, outs)
    kernel[(groups.argsort(1).argsort(1) < 2).reshape(rows, outs)] = 0
    return kernel


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_masked_models_save_their_zeros_and_masks_and_come_back(name, tmp_path):
    """GPT-2's query, key and value are one transposed tensor of the file; each has its own mask."""
    pruned = prune(tiny.model(name, num_hidden_layers=1), sparsity=0.4)
    dense = tiny.model(name, num_hidden_layers=1)  # the masks over weights that are not zero below
    masked = weights.add_masks(dense, pruned.masks)
    jf.save(masked, tmp_path / "masked")
    again = jf.load(tmp_path / "masked")
    np.testing.assert_array_equal(logits(again), logits(pruned.model))
    for path, mask in weights.masks_of(again).items():
        np.testing.assert_array_equal(mask, pruned.masks[path])
    tensors = load_file(tmp_path / "masked" / "model.safetensors")
    packed = {n: t for n, t in tensors.items() if n.endswith("weight_mask")}
    assert len(packed) == len(pruned.masks) and all(t.dtype == np.uint8 for t in packed.values())
    jf.save(pruned.model, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for tensor in plain:  # whoever does not know of masks reads the pruned weights
        np.testing.assert_array_equal(tensors[tensor], plain[tensor])
    jf.save(weights.merge_masks(masked), tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == plain.keys()


def test_masks_in_a_file(tmp_path):
    pruned = prune(tiny.model("llama"), sparsity=0.4)
    weights.save_masks(pruned.masks, tmp_path / "masks.safetensors")
    again = weights.load_masks(tmp_path / "masks.safetensors")
    assert again.keys() == pruned.masks.keys()
    for path, mask in again.items():
        np.testing.assert_array_equal(mask, pruned.masks[path])
    np.testing.assert_array_equal(logits(weights.add_masks(tiny.model("llama"), again)), logits(pruned.model))
    with pytest.raises(ValueError, match=r"no linear layer layers\.2.*and \d+ more"):
        weights.add_masks(tiny.model("llama", num_hidden_layers=2), again)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down has shape \(12, 8\), not \(16, 8\)"):
        weights.add_masks(tiny.model("llama", intermediate_size=16), again)
    with pytest.raises(ValueError, match="is float32, not bool"):
        weights.add_masks(tiny.model("llama"), {"layers.0.mlp.up": jnp.ones((8, 12))})
    with pytest.raises(ValueError, match="there are none"):
        weights.add_masks(tiny.model("llama"), {})
    save_file({"a": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no masks"):
        weights.load_masks(tmp_path / "other.safetensors")


def test_two_masks_are_both_obeyed_and_recorded_once():
    model = tiny.model("llama", num_hidden_layers=1)
    mask = np.random.default_rng(0).random((8, 12)) < 0.5
    other = np.random.default_rng(1).random((8, 12)) < 0.5
    twice = weights.add_masks(weights.add_masks(model, {"layers.0.mlp.up": mask}), {"layers.0.mlp.up": other})
    np.testing.assert_array_equal(weights.masks_of(twice)["layers.0.mlp.up"], mask & other)
    assert len(twice.surgery) == 1 and weights.merge_masks(twice).surgery == ()


# ---- N:M -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (1, 2), (3, 5)])
def test_packing_is_exact(n, m):
    kernel = np.random.default_rng(0).standard_normal((8 * m, 6)).astype(np.float32)
    groups = kernel.reshape(-1, m, 6)
    kernel = np.where(np.abs(groups).argsort(1).argsort(1) >= m - n, groups, 0).reshape(kernel.shape)
    kernel[:m, 0] = 0  # a group with fewer values than n
    packed = pack_kernel(kernel, n, m)
    assert packed.shape == kernel.shape and packed.values.shape == (8 * n, 6)
    np.testing.assert_array_equal(packed.dense(), kernel)
    flags = np.asarray(packed.mask()).reshape(-1, m, 6)
    assert (flags.sum(1) == n).all()
    x = np.random.default_rng(1).standard_normal((3, 8 * m)).astype(np.float32)
    np.testing.assert_allclose(weights.matmul(jnp.asarray(x), packed), x @ kernel, atol=1e-5)
    again = packed.from_tensors(packed.to_tensors().__getitem__)
    np.testing.assert_array_equal(again.dense(), kernel)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    np.testing.assert_array_equal(stacked.dense(), np.stack([kernel, kernel]))


def test_two_four_in_bfloat16_takes_nine_sixteenths():
    packed = pack_kernel(jnp.asarray(two_four(64, 8), jnp.bfloat16), 2, 4)
    assert packed.values.nbytes + packed.bits.nbytes == 64 * 8 * 2 * 9 / 16


def test_gradients_reach_the_values_that_stand_there():
    kernel, x = two_four(), np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    packed = pack_kernel(kernel, 2, 4)
    loss = lambda v: jnp.sum(weights.matmul(x, NMSparse(v, packed.bits)) ** 2)  # noqa: E731
    full = jax.grad(lambda k: jnp.sum((x @ k) ** 2))(jnp.asarray(kernel))
    expected = np.where(np.asarray(packed.mask()), full, 0)
    found = NMSparse(jax.grad(loss)(packed.values), packed.bits).dense()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_models_without_their_zeros_save_train_and_come_back(tmp_path):
    """GPT-2, whose file holds three kernels in one tensor, transposed."""
    pruned = prune(tiny.model("gpt2", num_hidden_layers=1), keep_n=2, m=4)
    packed = weights.pack_nm(pruned.model, 2, 4)
    assert isinstance(packed.layers[0].mlp.up.kernel.get_value(), NMSparse)
    np.testing.assert_allclose(logits(packed), logits(pruned.model), atol=1e-6)
    jf.save(packed, tmp_path / "packed")
    again = jf.load(tmp_path / "packed")
    np.testing.assert_array_equal(logits(again), logits(packed))
    jf.save(weights.unpack_nm(again), tmp_path / "plain")
    jf.save(pruned.model, tmp_path / "pruned")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "pruned"))
    assert all(np.array_equal(one[k], other[k]) for k in other) and one.keys() == other.keys()

    def objective(apply, params, batch, key):
        return jnp.mean(apply(params, batch).logits ** 2), {}

    config = jf.TrainConfig(steps=2, progress=False)
    trained = jf.fit(objective, again, [tiny.batch()], config, key=jax.random.key(0)).model
    for path, mask in pruned.masks.items():
        before, after = kernel_of(packed, path), kernel_of(trained, path)
        assert not np.any(np.asarray(after.dense())[~np.asarray(mask)])
        assert np.any(np.asarray(after.values) != np.asarray(before.values))
        np.testing.assert_array_equal(after.bits, before.bits)


def kernel_of(model, path):
    for part in path.split("."):
        model = getattr(model, part)
    return model.kernel.get_value()


def test_what_has_no_pattern_is_refused(tmp_path):
    model = tiny.model("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.key: \d+ of 8 groups have more than 2 of 4"):
        weights.pack_nm(model, 2, 4)
    with pytest.raises(ValueError, match=r"layers\.0.*m=3: it does not divide the 8 inputs"):
        weights.pack_nm(model, 2, 3)
    with pytest.raises(ValueError, match="n=0, m=4"):
        weights.pack_nm(model, 0, 4)
    packed = weights.pack_nm(prune(model, keep_n=2, m=4).model, 2, 4)
    with pytest.raises(ValueError, match="holds a NMSparse, no plain kernel"):
        weights.pack_nm(packed, 2, 4)
    jf.save(packed, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("nm_bits"))
    tensors[name] = tensors[name] ^ np.uint8(1)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="2 bits set of every 4"):
        jf.load(tmp_path / "packed")
