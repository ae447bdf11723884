"""One-shot pruning: the official masks, exact counts, patterns, calibration on real text, composition, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxformers as jf
from jaxformers import evaluation
from jaxformers.compress import hessian, pruning, threshold
from jaxformers.compress.essential_sparsity import erk_densities, prunable, prune
from jaxformers.data import text
from jaxformers.recipes import read_recipe, run_recipe
from jaxformers.weights import Masked, PackedWeight, add_lora, add_masks, masks_of, merge_lora
from tests import tiny

IDS = np.random.default_rng(0).integers(1, 20, (6, 10))
BERT_NAMES = {
    "attention.self.query": "attention.query", "attention.self.key": "attention.key",
    "attention.self.value": "attention.value", "attention.output.dense": "attention.out",
    "intermediate.dense": "mlp.up", "output.dense": "mlp.down",
}  # fmt: skip


def kernels(model):
    return {path: np.asarray(kernel) for path, (kernel, _) in prunable(model).items()}


def zeros(model):
    return sum(int((k == 0).sum()) for k in kernels(model).values())


def official_bert(z):
    """A BERT with the oracle's 72 matrices."""
    config = jf.models.bert.Config(vocab_size=9, hidden_size=8, num_hidden_layers=12, num_attention_heads=2,
                                   intermediate_size=20, max_position_embeddings=8)  # fmt: skip
    model = jf.init(config, key=jax.random.key(0))
    for name in z.files:
        if name.startswith("w::"):
            layer, own = name[3:].split(".", 1)
            module = model.layers[int(layer)]
            for part in BERT_NAMES[own].split("."):
                module = getattr(module, part)
            module.kernel.set_value(jnp.asarray(z[name].T))
    return model


# ---- the official code ---------------------------------------------------------------------------------------------


def test_global_magnitude_equals_the_official_pruner(oracles):
    z = np.load(oracles / "essential_sparsity" / "global_magnitude_bert.npz")
    model = official_bert(z)
    for s in json.loads(str(z["options"]))["sparsities"]:
        pruned = prune(model, sparsity=s)
        assert len(pruned.masks) == 72
        for name in z.files:
            if name.startswith(f"mask_{s}::"):
                layer, own = name.split("::")[1].split(".", 1)
                np.testing.assert_array_equal(pruned.masks[f"layers.{layer}.{BERT_NAMES[own]}"], z[name].T)
        total = sum(k.size for k in kernels(model).values())
        assert zeros(pruned.model) == round(s * total) and pruned.report.sparsity == pytest.approx(s, abs=1 / total)


def test_layerwise_magnitude_and_groups_equal_the_official_code(oracles):
    z = np.load(oracles / "essential_sparsity" / "layerwise_magnitude_opt.npz")
    s = json.loads(str(z["options"]))["sparsity"]
    names = [name[3:] for name in z.files if name.startswith("w::")]
    for name in names:
        w = z[f"w::{name}"].T
        (gone,) = threshold.smallest_of_all([threshold.keys(w)], round(s * w.size))
        np.testing.assert_array_equal(~gone, z[f"mask::{name}"].T)
    z = np.load(oracles / "essential_sparsity" / "n_m_opt.npz")
    for n, m in json.loads(str(z["options"]))["patterns"]:
        for name in [name[3:] for name in z.files if name.startswith("w::")]:
            gone = threshold.smallest_of_groups(threshold.keys(z[f"w::{name}"].T), n, m)
            np.testing.assert_array_equal(~gone, z[f"mask_zero{n}of{m}::{name}"].T)


def test_erk_densities_equal_the_official_code(oracles):
    z = np.load(oracles / "essential_sparsity" / "erk_density.npz")
    shapes = [tuple(map(int, shape)) for shape in z["shapes"]]
    for s in (0.5, 0.8, 0.95):
        np.testing.assert_allclose(erk_densities(shapes, s), z[f"density_{s}"], rtol=1e-9)


def test_wanda_and_sparsegpt_equal_the_official_code(oracles):
    for name in ("2to4", "unstructured_50"):
        z = np.load(oracles / "essential_sparsity" / f"oneshot_{name}.npz")
        H = np.zeros((160, 160), np.float32)
        H[np.triu_indices(160)] = z["H_upper"]
        check_one_shot(z, H + np.triu(H, 1).T, z["wanda_scaler_row"])


@pytest.mark.parametrize("name", ["4to8", "unstructured_70"])
def test_from_inputs_as_the_official_code(shared, name):
    z = np.load(shared / "oracles" / "essential_sparsity" / f"oneshot_{name}.npz")
    H, norms, seen = jnp.zeros(z["H"].shape), jnp.zeros(160), 0
    for x in z["X"]:
        H, _ = hessian.accumulate(H, seen, x[None])
        norms, seen = hessian.accumulate_norms(norms, seen, x[None])
    np.testing.assert_allclose(norms, z["wanda_scaler_row"], rtol=1e-5)
    check_one_shot(z, H, norms)


def check_one_shot(z, H, norms):
    o = json.loads(str(z["options"]))
    how = {"keep_n": o["m"] - o["zero_n"], "m": o["m"]} if o["m"] else {}
    W = z["W"].T
    mask = pruning.wanda(W, norms, **(how or {"drop": int(len(W) * o["sparsity"])}))
    np.testing.assert_array_equal(~np.asarray(mask).T, z["wanda_pruned"])
    how = how or {"sparsity": o["sparsity"]}
    found = pruning.sparsegpt(W, H, o["percdamp"], blocksize=o["blocksize"], **how)
    theirs = z["sparsegpt_W"].T
    assert (np.asarray(found.mask) == (theirs != 0)).mean() >= 0.999
    same = np.asarray(found.mask) == (theirs != 0)
    np.testing.assert_allclose(np.asarray(found.values)[same], theirs[same], atol=1e-4 * np.abs(theirs).max())
    D = np.asarray(W - found.values, np.float64)
    error = float(np.sum(D * (np.asarray(H, np.float64) @ D)))
    assert error == pytest.approx(float(z["err_sparsegpt"]), rel=0.01)
    assert error < float(z["err_wanda"])
    damped = error + 0.01 * np.mean(np.diag(H)) * np.sum(D**2)  # what the column loop adds up, times 2
    assert float(found.loss) == pytest.approx(damped / 2, rel=1e-3)


# ---- real text -----------------------------------------------------------------------------------------------------


def test_a_trained_model_on_real_text(shared):
    """Perplexities per byte of the reference (one-shot, no fine-tuning); its protocol."""
    folder = shared / "oracles" / "gptq" / "trained_byte_lm"
    said = json.loads((folder / "expected.json").read_text())
    data = shared / "data" / "wikitext2_small"
    valid, test = (np.frombuffer(text.read_text(data / f"{n}.txt.gz").encode(), np.uint8) for n in ("valid", "test"))
    windows = text.windows(test.astype(np.int32), 128)[:160]
    starts = np.random.default_rng(1).integers(0, len(valid) - 129, 64)
    calibration = np.stack([valid[i : i + 128] for i in starts]).astype(np.int32)
    model = jf.load(folder)
    loss = evaluation._step(jf.functional(model)[0])  # compiled once: every pruned model has the same structure
    of = lambda params: np.exp(np.mean([loss(params, windows[i : i + 32]) for i in range(0, 160, 32)]))  # noqa: E731
    measure = lambda pruned: float(of(jf.functional(pruned.model)[1]))  # noqa: E731
    assert of(jf.functional(model)[1]) == pytest.approx(said["dense"], abs=0.001)
    batch = {"calibration": calibration, "batch_size": 64}
    excess = {}
    for s in (0.3, 0.5, 0.7):
        own = f"{s:g}"[1:]
        excess[s] = measure(prune(model, sparsity=s))
        assert excess[s] == pytest.approx(said["magnitude_global"][own], abs=0.02)
        per_matrix = measure(prune(model, sparsity=s, scope="layer"))
        assert per_matrix == pytest.approx(said["magnitude_per_matrix_threshold"][own], abs=0.02)
        if s == 0.3:
            continue
        solved = measure(prune(model, "sparsegpt", sparsity=s, **batch))
        assert solved == pytest.approx(said["sparsegpt"][own], abs=0.02)
        assert measure(prune(model, "wanda", sparsity=s, **batch)) == pytest.approx(said["wanda"][own], abs=0.03)
    random = measure(prune(model, "random", sparsity=0.3, key=jax.random.key(0)))
    assert random - said["dense"] > 5 * (excess[0.3] - said["dense"])
    assert measure(prune(model, keep_n=2, m=4)) == pytest.approx(said["two_four"]["magnitude"], abs=0.02)
    two_four = measure(prune(model, "sparsegpt", keep_n=2, m=4, **batch))
    assert two_four == pytest.approx(said["two_four"]["sparsegpt"], abs=0.02)


# ---- invariants ----------------------------------------------------------------------------------------------------


@given(s=st.sampled_from([0.0, 0.333, 0.5, 0.9]) | st.floats(0, 0.999), method=st.sampled_from(["magnitude", "random"]))
@settings(max_examples=6)
def test_exact_counts(s, method):
    model = tiny.model("bert", num_hidden_layers=1, intermediate_size=13)
    options = {"key": jax.random.key(1)} if method == "random" else {}
    total = sum(k.size for k in kernels(model).values())
    found = prune(model, method, sparsity=s, **options)
    assert sum(int((~np.asarray(m)).sum()) for m in found.masks.values()) == round(s * total) == zeros(found.model)
    layer = prune(model, method, sparsity=s, scope="layer", **options)
    for path, mask in layer.masks.items():
        assert int((~np.asarray(mask)).sum()) == round(s * mask.size), path


@pytest.mark.parametrize(("name", "method"), [("bert", "magnitude"), ("llama", "wanda"), ("gpt2", "sparsegpt")])
def test_every_group_of_inputs_keeps_its_number(name, method):
    """Along the inputs whatever the architecture, transposed kernels of the file (GPT-2's) included."""
    model = tiny.model(name, intermediate_size=16) if name != "gpt2" else tiny.model(name)
    data = {} if method == "magnitude" else {"calibration": IDS}
    for path, kernel in kernels(prune(model, method, keep_n=1, m=4, **data).model).items():
        groups = (kernel != 0).reshape(-1, 4, kernel.shape[1]).sum(1)
        assert (groups == 1).all(), path


def test_only_the_blocks_matrices_are_touched():
    model = tiny.model("bert", num_hidden_layers=2)
    pruned = prune(model, sparsity=0.5, exclude="layers.0.attention.*")
    _, before = jf.functional(model)
    _, after = jf.functional(pruned.model)
    before, after = jf.paths.flatten(before), jf.paths.flatten(after)
    changed = {path.removesuffix(".kernel") for path in before if np.any(before[path] != after[path])}
    assert changed == set(pruned.masks) and len(changed) == 2 * 6 - 4
    assert not any(path.startswith(("embeddings", "head", "layers.0.attention")) for path in changed)
    kept = [np.asarray(after[f"{p}.kernel"])[np.asarray(m)] for p, m in pruned.masks.items()]
    gone = [np.asarray(before[f"{p}.kernel"])[~np.asarray(m)] for p, m in pruned.masks.items()]
    assert np.abs(np.concatenate(kept)).min() >= np.abs(np.concatenate(gone)).max()
    assert "50.00% of the prunable weights" in str(pruned.report)
    size = sum(m.size for m in pruned.masks.values())
    assert pruned.report.model_sparsity == pytest.approx(0.5 * size / sum(a.size for a in before.values()))


def test_what_is_shared_counts_once():
    model = tiny.model("bert", num_hidden_layers=2)
    model.layers[1].mlp.up = model.layers[0].mlp.up
    assert len(prunable(model)) == 11


def test_pruning_again_only_removes_more_and_masks_are_obeyed():
    model = tiny.model("llama", num_hidden_layers=1)
    first = prune(model, sparsity=0.4)
    drifted = add_masks(model, first.masks)  # the base under the masks is dense
    data = {"calibration": IDS}
    for method, options in (("magnitude", {}), ("sparsegpt", data)):
        again = prune(drifted, method, sparsity=0.6, **options)
        for path, mask in again.masks.items():
            own = np.asarray(first.masks[path])
            if method == "magnitude":
                assert not np.any(np.asarray(mask) & ~own), path
            kernel = kernels(again.model)[path]
            assert not np.any(kernel[~own]) and not np.any(kernel[~np.asarray(mask)]), path
    assert masks_of(again.model) == {} and again.model.surgery == ()


def test_sparsegpt_beats_magnitude():
    model = tiny.model("llama", num_hidden_layers=1)
    apply, params = jf.functional(model)
    logits = jax.jit(lambda params: apply(params, {"input_ids": IDS}).logits)

    def error(pruned):
        return float(jnp.mean((logits(jf.functional(pruned.model)[1]) - logits(params)) ** 2))

    many = np.random.default_rng(1).integers(1, 20, (64, 12))
    solved = prune(model, "sparsegpt", sparsity=0.5, calibration=many)
    assert error(solved) < 0.9 * error(prune(model, sparsity=0.5, scope="layer"))
    assert all(m.removed == m.size // 2 + 1 for m in solved.report.matrices)  # `<=` the middle
    assert zeros(prune(model, "sparsegpt", sparsity=0.0, calibration=IDS).model) == 0


def test_bfloat16_has_ties_and_exact_counts():
    config = dataclasses.replace(tiny.LLAMA, num_hidden_layers=1)
    model = jf.init(config, head="causal_lm", key=jax.random.key(0), dtype="bfloat16")
    total = sum(k.size for k in kernels(model).values())
    found = prune(model, sparsity=0.37)
    assert zeros(found.model) == round(0.37 * total)
    assert all(k.dtype == jnp.bfloat16 for k in kernels(found.model).values())
    solved = prune(model, "sparsegpt", sparsity=0.5, calibration=IDS)
    assert all(k.dtype == jnp.bfloat16 for k in kernels(solved.model).values())


# ---- composition ---------------------------------------------------------------------------------------------------


def test_pruned_then_quantised_keeps_its_zeros(tmp_path):
    """As a chain of checkpoints: masks are in the first, and in the codes of the second."""
    config = jf.models.llama.Config(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=64, max_position_embeddings=16)  # fmt: skip
    model = jf.init(config, head="causal_lm", key=jax.random.key(0))
    jf.save(model, tmp_path / "dense")
    steps = [{"method": "prune", "by": "sparsegpt", "keep_n": 2, "m": 4}, {"method": "gptq", "bits": 4}]
    chain = run_recipe(tmp_path / "dense", steps, tmp_path / "out", calibration=IDS)
    masks = prune(model, "sparsegpt", keep_n=2, m=4, calibration=IDS).masks
    again = jf.load(tmp_path / "out" / chain.rows[2].directory)
    assert masks_of(jf.load(tmp_path / "out" / chain.rows[1].directory)).keys() == masks.keys()
    for path, mask in masks.items():
        kernel = merged_kernel(again, path)
        assert isinstance(kernel, PackedWeight)
        assert not np.any(np.asarray(kernel.dense())[~np.asarray(mask)]), path
    with pytest.raises(ValueError, match="step 0: prune: sparsity=2: must be"):
        read_recipe([{"method": "prune", "sparsity": 2}])


def test_pruned_with_a_low_rank_update(tmp_path):
    """A mask over the update: training a and b never fills a zero, and merging keeps them."""
    model = tiny.model("llama", num_hidden_layers=1)
    pruned = prune(model, sparsity=0.5)
    adapted = add_masks(add_lora(pruned.model, "layers.**", rank=2, key=jax.random.key(0)), pruned.masks)

    def objective(apply, params, batch, key):
        return jnp.mean((apply(params, batch).logits - 1) ** 2), {}

    data = [{"input_ids": IDS}]
    trained = jf.fit(objective, adapted, data, jf.TrainConfig(steps=3, progress=False), key=jax.random.key(0)).model
    jf.save(trained, tmp_path / "lora")
    again = jf.load(tmp_path / "lora")
    for found in (trained, again):
        merged = merge_lora(found)
        for path, mask in masks_of(merged).items():
            kernel = np.asarray(merged_kernel(merged, path).dense())
            assert not np.any(kernel[~np.asarray(mask)]) and isinstance(merged_kernel(merged, path), Masked)
            assert np.any(kernel != np.asarray(merged_kernel(pruned.model, path)))
    plain = jf.weights.merge_masks(merged)
    assert plain.surgery == () and zeros(plain) == zeros(pruned.model)


def merged_kernel(model, path):
    module = model
    for part in path.split("."):
        module = getattr(module, part)
    return module.kernel.get_value()


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity, keep_n, m: give either"),
        ({"sparsity": 0.5, "keep_n": 2, "m": 4}, "sparsity, keep_n, m: give either"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"keep_n": 5, "m": 4}, "keep_n=5, m=4"),
        ({"m": 4}, "keep_n=None, m=4"),
        ({"keep_n": 2, "m": 5}, "m=5: it does not divide the 8 inputs of layers.0"),
        ({"keep_n": 1, "m": 7, "strict": False}, "the last 1 inputs of layers.0"),
        ({"method": "l1", "sparsity": 0.5}, "method='l1'"),
        ({"sparsity": 0.5, "scope": "row"}, "scope='row'"),
        ({"method": "wanda", "sparsity": 0.5, "scope": "layer", "calibration": IDS}, "scope='layer'"),
        ({"method": "wanda", "sparsity": 0.5}, "calibration: method='wanda' needs"),
        ({"method": "sparsegpt", "sparsity": 0.5}, "calibration: method='sparsegpt' needs"),
        ({"sparsity": 0.5, "calibration": IDS}, "looks at the weights alone"),
        ({"method": "random", "sparsity": 0.5}, "key"),
        ({"sparsity": 0.5, "key": jax.random.key(0)}, "key"),
        ({"method": "erk", "keep_n": 2, "m": 4, "key": jax.random.key(0)}, "densities of erk"),
        ({"method": "sparsegpt", "sparsity": 0.5, "calibration": IDS, "damp": 0.0}, "damp"),
        ({"method": "sparsegpt", "sparsity": 0.5, "calibration": IDS, "blocksize": 0}, "blocksize"),
        ({"method": "wanda", "sparsity": 0.5, "calibration": IDS + 20}, "vocabulary"),
        ({"method": "wanda", "sparsity": 0.5, "calibration": IDS, "batch_size": 0}, "batch_size"),
        ({"sparsity": 0.5, "include": "layers.*.attention.q_proj"}, "include: no linear layer"),
        ({"sparsity": 0.5, "exclude": "layers.9.**"}, "exclude: 'layers.9"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        prune(tiny.model("bert", num_hidden_layers=1), **options)


def test_weights_that_are_not_finite_or_quantised_name_the_layer():
    model = tiny.model("bert", num_hidden_layers=1)
    kernel = model.layers[0].mlp.up.kernel
    kernel.set_value(kernel.get_value().at[0, 0].set(np.nan))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up holds weights that are not finite"):
        prune(model, sparsity=0.5)
    with pytest.raises(ValueError, match="not finite on the calibration data"):
        prune(model, "wanda", sparsity=0.5, calibration=IDS)
    packed = jf.compress.gptq(jf.init({"model_type": "llama", "vocab_size": 20, "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}, head="causal_lm",
        key=jax.random.key(0)), bits=4, method="rtn")  # fmt: skip
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.\w+ is already quantised"):
        prune(packed, sparsity=0.5)
