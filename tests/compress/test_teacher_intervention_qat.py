"""The recipe on small models: two steps, resumed between them, the files it leaves, other encoders."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers import paths
from jaxformers.compress.teacher_intervention import MARK, TIConfig, forward_pass, ternary_kernels
from jaxformers.compress.teacher_intervention_qat import PAPER, qat
from jaxformers.fake_quant import TERNARY, Quantiser
from jaxformers.models import bert, roberta, vit
from jaxformers.train import TrainConfig
from jaxformers.weights import FakeQuant, TernaryCodes, fake_quantise, pack_ternary

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
ROWS = {
    "input_ids": RNG.integers(3, 40, (48, 8)).astype(np.int32),
    "attention_mask": (np.arange(8) < RNG.integers(3, 9, (48, 1))).astype(np.int32),
    "labels": RNG.integers(0, 2, 48).astype(np.int32),
}
PART = {name: x[:16] for name, x in ROWS.items()}


def training(steps, **options):
    optim = dataclasses.replace(PAPER, learning_rate=1e-3)
    return TrainConfig(steps=steps, optim=optim, progress=False, log_every=1, **options)


@pytest.fixture(scope="module")
def teacher():
    config = bert.Config(40, 64, 1, 2, 64, max_position_embeddings=8, initializer_range=0.2)
    return jf.init(config, head="sequence_classification", key=jax.random.key(1))


def logits(model, rows=PART):
    apply, params = jf.functional(model)
    return np.asarray(jax.jit(apply)(params, {k: v for k, v in rows.items() if k != "labels"}).logits)


def test_two_steps_resumed_between_them(teacher, tmp_path):
    config = TIConfig(intervention="map", step1=4)
    options = dict(key=KEY, config=config, batch_size=16, heldout=PART, train=training(7, eval_every=4))
    whole = qat(teacher, ROWS, tmp_path / "out", **options)
    assert whole.modes == ("map",) * 4
    calls = 0

    def interrupted(z, labels):
        nonlocal calls
        calls += 1
        if calls > 2:  # step 1 is measured with and without
            raise KeyboardInterrupt
        return {"accuracy": float((z.argmax(-1) == labels).mean())}

    with pytest.raises(KeyboardInterrupt):
        qat(teacher, ROWS, **{**options, "metric": interrupted, "directory": tmp_path / "run"})
    begun = (tmp_path / "run" / "step1" / "metrics.jsonl").read_text()
    again = qat(teacher, ROWS, **{**options, "directory": tmp_path / "run"})
    assert (tmp_path / "run" / "step1" / "metrics.jsonl").read_text().count('"train"') == begun.count('"train"') == 4
    assert tiny.largest_difference(jf.functional(again.student)[1], jf.functional(whole.student)[1]) == 0

    for name, count in (("step1", 4), ("step2", 3)):
        steps = [r for r in whole.history[name] if r["kind"] == "train"]
        assert len(steps) == count and all({"pred", "rep", "out", "score", "mode"} <= r.keys() for r in steps)
        assert steps[0]["learning_rate"] == 0 < steps[1]["learning_rate"], "each has its own warm-up"
    first, second = (next(r for r in whole.history[n] if r["kind"] == "eval") for n in ("step1", "step2"))
    assert first["eval_loss_with"] < first["eval_loss"] and "eval_accuracy_with" in first
    assert "eval_loss_with" not in second and 0.2 < second["eval_zeros"] < 0.7

    # ---- the files --------------------------------------------------------------------------------------------------
    shadow, served = jf.load(tmp_path / "out" / "shadow"), jf.load(tmp_path / "out" / "packed")
    assert shadow.surgery == ()
    ours = paths.flatten(jf.functional(whole.student)[1])
    for path, x in paths.flatten(jf.functional(shadow)[1]).items():
        np.testing.assert_array_equal(x, ours[path].base if isinstance(ours[path], FakeQuant) else ours[path])
    np.testing.assert_allclose(logits(served), logits(whole.student), atol=1e-5)
    assert np.abs(logits(shadow) - logits(whole.student)).max() > 1e-3
    codes = [w.base for w in paths.flatten(jf.functional(served)[1]).values() if isinstance(w, FakeQuant)]
    assert len(codes) == 6 + 1 + 1 and all(isinstance(w, TernaryCodes) for w in codes)
    stored = sum(a.nbytes for w in codes for a in w.to_tensors().values())
    assert stored <= sum(4 * np.prod(w.shape) for w in codes) / 12
    files = [(tmp_path / "out" / name / "model.safetensors").stat().st_size for name in ("packed", "shadow")]
    assert files[0] < 0.2 * files[1]


def test_the_shadow_loads_in_transformers(teacher, tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    done = qat(teacher, ROWS, tmp_path, key=KEY, batch_size=16, train=training(1), config=TIConfig("none"))
    assert done.modes == () and done.history["step1"] == []
    assert sum(record["kind"] == "train" for record in done.history["step2"]) == 1
    hf = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "shadow").eval()
    with torch.no_grad():
        theirs = hf(**{k: torch.tensor(v, dtype=torch.long) for k, v in PART.items() if k != "labels"}).logits.numpy()
    np.testing.assert_allclose(logits(jf.load(tmp_path / "shadow")), theirs, atol=1e-4)


def test_a_roberta_and_a_vit():
    """The same sites, whatever the encoder: what each mode leaves unreached, and the codes that serve the student."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    text = roberta.Config(vocab_size=40, max_position_embeddings=12, num_labels=1, initializer_range=0.2, **sizes)
    image = vit.Config(image_size=(8, 8), patch_size=(4, 4), initializer_range=0.2, **sizes)
    pixels = {"pixel_values": RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)}
    ids = {name: PART[name][:4] for name in ("input_ids", "attention_mask")}
    for config, head, batch, mode, count in (
        (text, "sequence_classification", ids, "output", 8),  # with the head's dense, which is RoBERTa's pooler
        (image, "image_classification", pixels, "context", 6),
    ):
        teacher, rules = jf.init(config, head=head, key=KEY), TIConfig()
        student = fake_quantise(
            teacher, ternary_kernels(teacher), inputs=rules.inputs, attention=rules.attention
        )  # fmt: skip
        forward = forward_pass(teacher, student, rules, {})
        own, above = jf.functional(student)[1], jf.functional(teacher)[1]
        assert sum(isinstance(w, FakeQuant) for w in paths.flatten(own).values()) == count
        loss = lambda own, batch, f=forward, above=above: f({"student": own, "teacher": above}, batch, None)[0]
        value, grads = jax.jit(jax.value_and_grad(loss))(own, {**batch, MARK + mode: np.zeros(4, bool)})
        assert np.isfinite(value) and value > 0
        attention = grads["layers"]["0"]["attention"]
        reached = {name: bool(np.any(attention[name]["kernel"].base)) for name in ("query", "key", "value", "out")}
        assert reached == {"query": True, "key": True, "value": False, "out": mode == "context"}
        np.testing.assert_allclose(logits(pack_ternary(student), batch), logits(student, batch), atol=1e-5)


def test_bad_input(teacher):
    go = lambda config=TIConfig(), steps=70, **options: qat(
        teacher, ROWS, **{"key": KEY, "config": config, "train": training(steps), **options}
    )
    with pytest.raises(ValueError, match="step1: 60 of 60 steps leave none for step 2"):
        go(steps=60)
    with pytest.raises(ValueError, match=r"kernels: 'layers.\*.attn' matches no weight"):
        go(TIConfig(kernels=(("layers.*.attn", TERNARY),)))
    with pytest.raises(ValueError, match="intervention needs equal shapes"):
        go(student=jf.init(bert.Config(40, 64, 2, 2, 64), head="sequence_classification", key=KEY))
    with pytest.raises(ValueError, match="heldout: rows with labels"):
        go(heldout={"input_ids": ROWS["input_ids"]})
    with pytest.raises(ValueError, match="inputs, attention: activations are rounded"):
        go(TIConfig(inputs=Quantiser("lsq", 8)))
    with pytest.raises(ValueError, match="freeze: 'student.nothing' matches no parameter"):
        go(train=training(70, freeze=("student.nothing",)))
