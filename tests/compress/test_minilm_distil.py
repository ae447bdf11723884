"""The MiniLM recipe, end to end on small models and the text that every Python carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers.compress.minilm import teacher_rows, v1, v2
from jaxformers.compress.minilm_distil import StudentConfig, _assistant, distil, pack, student_model
from jaxformers.data.batches import array_batches
from jaxformers.data.text import english_text
from jaxformers.data.tokenizers import train_wordpiece
from jaxformers.models import bert, llama
from jaxformers.train import OptimConfig, TrainConfig


@pytest.fixture(scope="module")
def texts():
    return [t for t in "\n".join(english_text().values()).split("\n") if t.strip()][:400]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_wordpiece(texts, 300)


@pytest.fixture(scope="module")
def teacher(tokenizer):
    config = bert.Config(tokenizer.vocab_size, 32, 4, 4, 64, max_position_embeddings=32)
    model = jf.init(config, key=jax.random.key(1))
    # random layers of std 0.02 attend uniformly; larger ones give relations worth imitating
    grow = lambda path, x: x * 8 if path[-1].key == "kernel" else x
    return jf.with_params(model, jax.tree_util.tree_map_with_path(grow, jf.functional(model)[1]))


def training(steps, **options):
    optim = OptimConfig(learning_rate=3e-3, warmup=0.1, weight_decay=options.pop("weight_decay", 0.01))
    return TrainConfig(steps=steps, optim=optim, progress=False, log_every=5, **options)


def test_distils_into_a_checkpoint_that_torch_reads(teacher, texts, tokenizer, tmp_path):
    options = dict(tokenizer=tokenizer, max_length=32, batch_size=16, heldout=texts[300:])
    every = {"train": training(60, eval_every=20), "key": jax.random.key(0)}
    result = distil(teacher, StudentConfig(2, 16), texts[:300], tmp_path / "student", **options, **every)
    held = [h["eval_loss"] for h in result.history["student"] if "eval_loss" in h]
    assert len(held) == 3 and held[0] > held[1] > held[2]
    assert "none asked for" in result.decision and result.assistant is None

    again = jf.load(tmp_path / "student")
    assert (again.config.num_hidden_layers, again.config.hidden_size) == (2, 16)
    batch = tokenizer(texts[:4], max_length=32)
    ours = jf.functional(again)
    hidden = np.asarray(ours[0](ours[1], batch).last_hidden_state)
    transformers = pytest.importorskip("transformers")
    import torch

    hf = transformers.BertModel.from_pretrained(tmp_path / "student", add_pooling_layer=False).eval()
    with torch.no_grad():
        theirs = hf(**{k: torch.tensor(v, dtype=torch.long) for k, v in batch.items()}).last_hidden_state.numpy()
    real = batch["attention_mask"] == 1
    np.testing.assert_allclose(hidden[real], theirs[real], atol=1e-4)
    assert jf.load_tokenizer(tmp_path / "student").encode(texts[0]) == tokenizer.encode(texts[0])


def test_what_the_loss_does_not_reach_stays(teacher, texts, tokenizer):
    student = StudentConfig(2, 16)
    key = jax.random.key(3)
    before = jf.functional(student_model(teacher, student, jax.random.split(key, (1, 2))[0][0]))[1]
    train = training(3, weight_decay=0.1)
    result = distil(teacher, student, texts, tokenizer=tokenizer, max_length=16, batch_size=8, key=key, train=train)
    after = jf.functional(result.student)[1]
    changed = {p for p, x in jf.paths.flatten(after).items() if (x != jf.paths.flatten(before)[p]).any()}
    last = [p for p in jf.paths.flatten(after) if jf.paths.matches("layers.1.{mlp,mlp_norm,attention_norm}.**", p)]
    assert last and not changed.intersection([*last, "layers.1.attention.out.kernel"])
    assert {"embeddings.token.embedding", "layers.0.mlp.up.kernel", "layers.1.attention.query.kernel"} <= changed


def test_assistant(teacher, texts, tokenizer):
    options = dict(tokenizer=tokenizer, max_length=16, batch_size=8, train=training(2), key=jax.random.key(0))
    config = v2(relation_heads=8, teacher_layer=3)  # for the first stage; the assistant teaches with its last layer
    result = distil(teacher, StudentConfig(1, 8), texts, assistant="auto", config=config, **options)
    assert result.decision == "4 x 8: student 1 x 8, teacher 4 x 32"
    assert len(result.assistant.layers) == 4 and result.assistant.config.hidden_size == 8
    assert set(result.history) == {"assistant", "student"} and len(result.student.layers) == 1


def test_when_an_assistant_is_made(teacher):
    assert _assistant(teacher, StudentConfig(2, 16), "auto")[0] == StudentConfig(4, 16)
    assert _assistant(teacher, bert.Config(50, 16, 2, 4, 32), "auto")[0] == StudentConfig(4, 16, 4)
    none, why = _assistant(teacher, StudentConfig(3, 16), "auto")
    assert none is None and why == "none: student 3 x 16, teacher 4 x 32 (needs at most half of both)"
    assert _assistant(teacher, StudentConfig(2, 17), "auto")[0] is None
    given = StudentConfig(3, 24)
    assert _assistant(teacher, StudentConfig(2, 16), given) == (given, "given")
    assert _assistant(teacher, StudentConfig(2, 16), None) == (None, "none asked for")


def test_initialisation_from_the_teachers_layers(teacher):
    student = student_model(teacher, StudentConfig(2, 32, intermediate=64, init="teacher"), jax.random.key(0))
    ours, theirs = (jf.functional(m)[1] for m in (student, teacher))
    assert (ours["embeddings"]["token"]["embedding"] == theirs["embeddings"]["token"]["embedding"]).all()
    for i, j in (("0", "1"), ("1", "3")):
        same = jax.tree.map(lambda a, b: bool((a == b).all()), ours["layers"][i], theirs["layers"][j])
        assert all(jax.tree.leaves(same))
    with pytest.raises(ValueError, match="'teacher' needs equal sizes"):
        student_model(teacher, StudentConfig(2, 16, init="teacher"), jax.random.key(0))
    with pytest.raises(ValueError, match="the teacher has 4 layers to copy"):
        student_model(teacher, StudentConfig(5, 32, intermediate=64, init="teacher"), jax.random.key(0))


def test_decoder_teachers_get_decoder_students(texts, tokenizer):
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64)
    teacher = jf.init(llama.Config(tokenizer.vocab_size, 16, 2, **sizes), key=jax.random.key(0))
    options = dict(tokenizer=tokenizer, max_length=16, batch_size=8, train=training(2), key=jax.random.key(0))
    result = distil(teacher, StudentConfig(1, 8), texts, config=v1(causal=True), **options)
    assert type(result.student).__name__ == "Llama"
    with pytest.raises(ValueError, match="causal"):
        distil(teacher, StudentConfig(1, 8), texts, **options)


def test_batches_can_be_given(teacher):
    batch = {"input_ids": np.arange(32, dtype=np.int32).reshape(2, 16), "attention_mask": np.ones((2, 16), np.int32)}
    result = distil(teacher, StudentConfig(1, 8), [batch], train=training(4), key=jax.random.key(0))
    assert len(result.student.layers) == 1
    records = result.history["student"]
    assert records[-1]["step"] == 4 and records[-1]["loss"] == pytest.approx(records[-1]["QK"] + records[-1]["VV"])


def test_a_teacher_asked_beforehand_teaches_the_assistant_alone(teacher, texts, tokenizer):
    rows = {k: x[:32] for k, x in pack(texts, tokenizer, 16).items()}
    known = teacher_rows(teacher, rows, [v1()], dtype="float32")
    held = array_batches(known, 16, shuffle=False, epochs=1)
    go = lambda rows, heldout: distil(
        teacher, StudentConfig(1, 8), array_batches(rows, 8), assistant=StudentConfig(2, 8), heldout=heldout,
        train=training(4), key=jax.random.key(0),
    )  # fmt: skip
    with_rows, without = go(known, held), go(rows, array_batches(rows, 16, shuffle=False, epochs=1))
    for name in ("assistant", "student"):
        a, b = (r.history[name][-1]["eval_loss"] for r in (with_rows, without))
        assert a == pytest.approx(b, rel=1e-4), name


def test_packing(tokenizer, texts, tmp_path):
    rows = pack(texts, tokenizer, 12)
    ids = rows["input_ids"]
    assert (ids[:, 0] == tokenizer.cls_id).all() and (ids[:-1, -1] == tokenizer.sep_id).all()
    stream = np.concatenate([tokenizer.encode(t, add_special_tokens=False) for t in texts])
    kept = ids[:-1, 1:-1].ravel()
    assert (kept == stream[: len(kept)]).all() and rows["attention_mask"][:-1].all()
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    assert (pack(tmp_path / "a.txt", tokenizer, 12)["input_ids"] == ids).all()
    with pytest.raises(ValueError, match="no text"):
        pack([" "], tokenizer, 12)


def test_errors_come_before_any_compute(teacher, texts, tokenizer):
    go = lambda student=StudentConfig(2, 16), corpus=texts, **kw: distil(
        teacher, student, corpus, key=jax.random.key(0), **{"tokenizer": tokenizer, "max_length": 16, **kw}
    )
    with pytest.raises(ValueError, match="max_length: 64 tokens exceed the teacher's 32 positions"):
        go(max_length=64)
    with pytest.raises(ValueError, match="tokenizer: it has 400 ids, the teacher's vocabulary"):
        go(tokenizer=train_wordpiece(texts, 400))
    with pytest.raises(ValueError, match="tokenizer: it has .* the student's vocabulary 20"):
        go(bert.Config(20, 16, 2, 4, 32, max_position_embeddings=32))
    with pytest.raises(ValueError, match="tokenizer: the teacher has no directory"):
        go(tokenizer=None)
    with pytest.raises(ValueError, match="assistant: must be None, 'auto'"):
        go(assistant="big")
    with pytest.raises(ValueError, match="heads: 4 do not divide the student's width 18"):
        go(StudentConfig(2, 18))
    with pytest.raises(ValueError, match="equal head counts: teacher 4, student 2"):
        go(StudentConfig(2, 16, heads=2))
    with pytest.raises(ValueError, match="init"):
        StudentConfig(2, 16, init="zero")
    with pytest.raises(ValueError, match="corpus: expected texts"):
        go(corpus=3)
    assert jnp.isfinite(jf.functional(teacher)[1]["embeddings"]["token"]["embedding"]).all()


def test_a_real_teacher(minilm, texts, tmp_path):
    """all-MiniLM-L6-v2, itself a MiniLM student, teaches an even smaller one."""
    student = StudentConfig(1, 48)
    options = dict(max_length=32, batch_size=8, heldout=texts[:40], key=jax.random.key(0))
    result = distil(minilm, student, texts, tmp_path / "student", train=training(12, eval_every=4), **options)
    held = [h["eval_loss"] for h in result.history["student"] if "eval_loss" in h]
    assert held[0] > held[1] > held[2] > 0
    small = jf.load(tmp_path / "student")
    assert (small.config.num_attention_heads, small.config.vocab_size) == (12, 30522)
    assert jf.embed(small, texts[:2]).shape == (2, 48)
