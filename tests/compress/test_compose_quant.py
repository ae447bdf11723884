"""Compressions one after another, on small models that do something: each step's file is what the next one reads."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import losses, paths, weights
from jaxformers.compress.gptq import dequantize, gptq
from jaxformers.compress.minilm_distil import StudentConfig, distil
from jaxformers.compress.rmsnorm import convert_norm
from jaxformers.compress.teacher_intervention import TIConfig
from jaxformers.compress.teacher_intervention_qat import PAPER, qat
from jaxformers.data.batches import array_batches
from jaxformers.data.text import english_text
from jaxformers.data.tokenizers import load_tokenizer, train_wordpiece
from jaxformers.models import bert, gpt2
from jaxformers.train import OptimConfig, TrainConfig, fit
from jaxformers.weights import FakeQuant, PackedWeight, TernaryCodes


def quiet(steps, rate=3e-3, **options):
    return TrainConfig(steps=steps, optim=OptimConfig(learning_rate=rate), progress=False, log_every=steps, **options)


def accuracy(model, rows):
    apply, params = jf.functional(model)
    inputs = {k: v for k, v in rows.items() if k != "labels"}
    return float((np.asarray(jax.jit(apply)(params, inputs).logits).argmax(-1) == rows["labels"]).mean())


def test_a_trained_classifier_becomes_ternary_and_is_served_packed(tmp_path):
    """Which of two marks comes first? One layer of attention learns it, keeps it in two bits, and from the file."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 30, (512, 8)).astype(np.int32)
    where = np.sort(np.stack([rng.permutation(7)[:2] + 1 for _ in ids]), axis=1)
    labels = rng.integers(0, 2, 512).astype(np.int32)
    ids[np.arange(512), where[:, 0]], ids[np.arange(512), where[:, 1]] = 3 + labels, 4 - labels
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}
    held = {k: v[:128] for k, v in rows.items()}
    rows = {k: v[128:] for k, v in rows.items()}
    config = bert.Config(32, 32, 1, 4, 64, max_position_embeddings=8, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0)  # fmt: skip
    model = jf.init(config, head="sequence_classification", key=jax.random.key(0))

    def objective(apply, params, batch, key):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return losses.cross_entropy(apply(params, inputs).logits, batch["labels"]), {}

    teacher = fit(objective, model, array_batches(rows, 64), quiet(150), key=jax.random.key(1)).model
    jf.save(teacher, tmp_path / "teacher")
    options = dict(key=jax.random.key(2), batch_size=64, config=TIConfig("map", step1=40))
    train = dataclasses.replace(quiet(160), optim=dataclasses.replace(PAPER, learning_rate=3e-3))
    done = qat(tmp_path / "teacher", rows, tmp_path / "student", train=train, **options)
    served = jf.load(tmp_path / "student" / "packed")
    jf.save(served, tmp_path / "again")
    again = jf.load(tmp_path / "again")
    kernel = again.layers[0].attention.query.kernel.get_value()
    assert isinstance(kernel, FakeQuant) and isinstance(kernel.base, TernaryCodes)
    both = jf.functional(again), jf.functional(done.student)
    z = [np.asarray(jax.jit(apply)(params, {"input_ids": held["input_ids"]}).logits) for apply, params in both]
    np.testing.assert_allclose(*z, atol=1e-5)
    assert accuracy(teacher, held) > 0.9
    assert accuracy(again, held) > 0.8


def test_a_distilled_student_is_quantised_to_4_bits(tmp_path):
    texts = [t for t in "\n".join(english_text().values()).split("\n") if t.strip()][:300]
    tokenizer = train_wordpiece(texts, 300)
    size = bert.Config(tokenizer.vocab_size, 64, 2, 4, 96, max_position_embeddings=24)
    teacher = jf.init(size, key=jax.random.key(1))
    grow = lambda path, x: x * 6 if path[-1].key == "kernel" else x
    teacher = jf.with_params(teacher, jax.tree_util.tree_map_with_path(grow, jf.functional(teacher)[1]))
    made = distil(
        teacher, StudentConfig(1, 32), texts, tmp_path / "student", tokenizer=tokenizer, max_length=24, batch_size=16,
        train=quiet(30), key=jax.random.key(0),
    )  # fmt: skip
    student, words = jf.load(tmp_path / "student"), load_tokenizer(tmp_path / "student")
    batch = words(texts[:64], max_length=24, buckets=(24,))
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    small = gptq(student, batch, bits=4, group_size=16)
    jf.save(small, tmp_path / "packed", words)
    served = jf.load(tmp_path / "packed")
    kernels = [w for w in paths.flatten(jf.functional(served)[1]).values() if isinstance(w, PackedWeight)]
    assert len(kernels) == 6 and {w.bits for w in kernels} == {4}
    models = made.student, served, dequantize(served)
    before, after, unpacked = (jf.embed(m, texts[64:96], tokenizer=words) for m in models)
    cosine = np.sum(before * after, 1) / (np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1))
    assert cosine.mean() > 0.99, "what was distilled is still there in 4 bits"
    np.testing.assert_allclose(after, unpacked, atol=1e-5)
    assert np.abs(before - after).max() > 1e-3, "rounding shows"


def test_gptq_refuses_weights_that_are_rounded_as_they_are_used():
    model = jf.init(bert.Config(30, 16, 1, 2, 16), key=jax.random.key(0))
    fake = weights.fake_quantise(model, {"layers.**": jf.fake_quant.TERNARY})
    with pytest.raises(ValueError, match="already quantised: its weights are FakeQuant"):
        gptq(fake, np.ones((4, 8), np.int32))


def test_a_stream_that_lost_a_coordinate_is_packed(tmp_path):
    """Width 33 leaves 32 after CRMSNorm, which fill words: MLPs are packed. The heads have 33 entries as before, and
    attention stays dense."""
    shape = gpt2.Config(vocab_size=40, hidden_size=33, num_hidden_layers=2, num_attention_heads=3,
                        intermediate_size=64, max_position_embeddings=16, initializer_range=0.2)  # fmt: skip
    model = jf.init(shape, head="causal_lm", key=jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 40, (8, 16)).astype(np.int32)
    narrow = convert_norm(model, "crms")
    small = gptq(narrow, ids, bits=8, group_size=32)
    jf.save(small, tmp_path / "packed")
    again = jf.load(tmp_path / "packed")
    assert again.surgery == small.surgery
    flat = paths.flatten(jf.functional(again)[1])
    packed = {path.split(".", 2)[2] for path, w in flat.items() if isinstance(w, PackedWeight)}
    assert packed == {"mlp.up.kernel", "mlp.down.kernel"}
    for path, shape in (("mlp.up", (32, 64)), ("mlp.down", (64, 32)), ("attention.query", (32, 33))):
        assert flat[f"layers.1.{path}.kernel"].shape == shape
    source, ours, theirs = (np.asarray(jax.jit(apply)(params, {"input_ids": ids}).logits)
                            for apply, params in map(jf.functional, (model, small, again)))  # fmt: skip
    np.testing.assert_array_equal(ours, theirs)
    assert 0 < np.abs(ours - source).max() < 0.02 * np.abs(source).max()
