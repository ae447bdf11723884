"""STAR: sampling, the training step, the recipe and its artefact."""

import json
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformers as jf
from jaxformers.data.text import python_sources
from jaxformers.data.tokenizers import train_bpe, train_wordpiece
from jaxformers.losses import supcon_loss
from jaxformers.metrics import accuracy
from jaxformers.models import bert, roberta
from jaxformers.pretrain.star import AuthorIndex, StyleModel, StylePretrainer, star_objective
from jaxformers.pretrain.star_batches import AuthorBatches, author_table
from jaxformers.train import OptimConfig, TrainConfig, fit


@pytest.fixture(scope="module")
def table():
    """Authors are modules of the standard library, documents their thirds, texts 40 lines each."""
    rows = []
    for name, source in python_sources(800_000).items():
        lines = [line for line in source.splitlines() if line.strip()]
        texts = ["\n".join(lines[i : i + 40]) for i in range(0, min(len(lines), 480) - 39, 40)]
        if len(texts) >= 9:
            rows += [{"author": name, "text": t, "doc": i * 3 // len(texts)} for i, t in enumerate(texts)]
    return rows


@pytest.fixture(scope="module")
def tokenizer(table):
    return train_wordpiece([r["text"] for r in table], 500, lowercase=False)


def backbone(tokenizer, layers=2, width=32, **options):
    sizes = {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options}
    return jf.init(bert.Config(tokenizer.vocab_size, width, layers, 4, 2 * width, **sizes), key=jax.random.key(0))


def training(steps, **options):
    rate = options.pop("learning_rate", 1e-3)
    optim = OptimConfig(learning_rate=rate, warmup=0.1, weight_decay=0.01)
    return TrainConfig(steps=steps, optim=optim, progress=False, **options)


# ---- batches -------------------------------------------------------------------------------------------------------


def sampler(table, tokenizer, authors=4, views=3, **options):
    return AuthorBatches(author_table(table), authors, views, tokenizer=tokenizer, max_length=32, **options)


def test_author_batches(table, tokenizer):
    data = sampler(table, tokenizer, 6, 4, seed=3)
    known = author_table(table)
    for step in range(20):
        authors, rows = data.draw(step)
        assert len(set(authors)) == 6
        for a, mine in zip(authors, rows, strict=True):
            assert {known["author"][r] for r in mine} == {data.authors[a]}
            assert len(set(mine)) == 4 and len({known["doc"][r] for r in mine}) > 1
    batch = next(iter(data))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, 4, 32) and batch["labels"].shape == (6,)
    authors, rows = data.draw(0)
    np.testing.assert_array_equal(batch["labels"], authors)
    expected = tokenizer([known["text"][rows[2, 1]]], max_length=32, buckets=(32,))["input_ids"][0]
    np.testing.assert_array_equal(batch["input_ids"][2, 1], expected)


def test_every_author_is_drawn_as_often_as_any_other(table, tokenizer):
    data = sampler(table, tokenizer)
    drawn = Counter(a for step in range(3000) for a in data.draw(step)[0])
    expected = 3000 * 4 / len(data.authors)
    assert len(drawn) == len(data.authors)
    assert abs(np.array(list(drawn.values())) / expected - 1).max() < 0.25


def test_author_batches_are_seeded_and_resumable(table, tokenizer):
    same = lambda a, b: all(np.array_equal(a[k], b[k]) for k in a)
    data = sampler(table, tokenizer, seed=1)
    it = iter(data)
    first = [next(it) for _ in range(3)]
    state = json.loads(json.dumps(it.get_state()))
    following = next(it)
    again = iter(sampler(table, tokenizer, seed=1))
    assert all(same(next(again), b) for b in first)
    resumed = iter(sampler(table, tokenizer, seed=1))
    resumed.set_state(state)
    assert same(next(resumed), following)
    assert not same(next(iter(sampler(table, tokenizer, seed=2))), first[0])
    assert len(list(sampler(table, tokenizer, batches=3))) == 3


def test_few_texts_are_drawn_with_replacement(tokenizer):
    table = [{"author": a, "text": f"text {i} of {a}"} for a in "ab" for i in range(2)]
    _, rows = sampler(table, tokenizer, 2, 5).draw(0)
    assert rows.shape == (2, 5) and {len(set(r)) for r in rows} <= {1, 2}
    _, rows = sampler(table, tokenizer, 2, 2).draw(0)
    assert all(len(set(r)) == 2 for r in rows)


def test_author_table_drops_copies_and_single_texts():
    rows = [("a", "one"), ("a", "two"), ("b", "three"), ("b", "four"), ("c", "same"), ("d", "same"), ("d", "five")]
    with pytest.warns(UserWarning, match="2 of 4 authors have fewer than two texts"):
        kept = author_table({"author": [a for a, _ in rows], "text": [t for _, t in rows]})
    assert kept["author"] == ["a", "a", "b", "b"]
    sources = {"author": list("aabb"), "text": ["x", "y", "x", "z"], "source": ["blog", "blog", "books", "books"]}
    assert author_table(sources)["text"] == ["x", "y", "x", "z"]  # a copy in another source is another text
    with pytest.raises(ValueError, match="fewer than two authors"), pytest.warns(UserWarning):
        author_table({"author": ["a", "a", "b"], "text": ["x", "y", "z"]})
    with pytest.raises(ValueError, match="text 1 is empty"):
        author_table({"author": ["a", "a"], "text": ["x", ""]})


# ---- training ------------------------------------------------------------------------------------------------------


def test_gradient_caching_ends_where_the_full_batch_ends(table, tokenizer):
    pretrainer = StylePretrainer(backbone(tokenizer), tokenizer=tokenizer, max_length=32, key=jax.random.key(1))
    runs = [
        pretrainer.fit(table, authors_per_batch=4, views=3, chunk=chunk, train=training(3), key=jax.random.key(2))
        for chunk in (8, 12)
    ]
    flat = [jf.paths.flatten(jf.functional(r.model)[1]) for r in runs]
    for path, full in flat[1].items():
        np.testing.assert_allclose(flat[0][path], full, atol=1e-5, err_msg=path)
    before = jf.paths.flatten(jf.functional(pretrainer.model)[1])
    assert max(float(jnp.abs(flat[0][p] - before[p]).max()) for p in before) > 1e-3  # they went somewhere
    assert runs[0].settings["log_scale"] != pytest.approx(np.log(1 / 0.07), abs=1e-6)


@pytest.mark.parametrize("compat", [None, "star"])
def test_objective_is_the_loss_of_the_embeddings(table, tokenizer, compat):
    pretrainer = StylePretrainer(backbone(tokenizer), tokenizer=tokenizer, max_length=32, key=jax.random.key(1))
    apply, params = jf.functional(pretrainer.model)
    batch = next(iter(sampler(table, tokenizer)))
    log_scale = jnp.float32(0.07 if compat else 2.0)
    loss = jax.jit(lambda p, b: star_objective(5, compat=compat)(apply, p, b, None))
    value, metrics = loss({"model": params, "log_scale": log_scale}, batch)
    flat = {k: batch[k].reshape(12, 32) for k in ("input_ids", "attention_mask")}
    z = jax.jit(apply)(params, flat).pooled.reshape(4, 3, -1)
    expected = supcon_loss(z, jnp.array(batch["labels"]), log_scale=log_scale, compat=compat)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["scale"], 100.0 if compat else np.exp(2.0), rtol=1e-5)
    fixed = jax.jit(lambda p, b: star_objective(5, temperature=0.1)(apply, p, b, None))
    value, metrics = fixed({"model": params}, batch)
    np.testing.assert_allclose(value, supcon_loss(z, jnp.array(batch["labels"]), temperature=0.1), rtol=1e-4)
    np.testing.assert_allclose(metrics["scale"], 10.0, rtol=1e-6)


def test_training_learns_authors_and_shuffled_labels_do_not(table, tokenizer):
    """Support: two thirds of each module; query: the last third."""
    support, query = [r for r in table if r["doc"] < 2], [r for r in table if r["doc"] == 2]
    pretrainer = StylePretrainer(backbone(tokenizer), tokenizer=tokenizer, max_length=32, key=jax.random.key(1))
    train = training(60, learning_rate=2e-3)
    options = dict(authors_per_batch=8, views=4, chunk=32, train=train, key=jax.random.key(2))

    def found(style):
        top = AuthorIndex(support, style.embed).predict([r["text"] for r in query])
        return accuracy([r["author"] for r in query], [t[0][0] for t in top])

    order = np.random.default_rng(0).permutation(len(support))
    shuffled = [{**r, "author": support[i]["author"]} for r, i in zip(support, order, strict=True)]
    before, after = found(pretrainer.untrained()), found(pretrainer.fit(support, **options))
    control = found(pretrainer.fit(shuffled, **options))
    assert after > before + 0.1, (before, after, control)
    assert control < before + 0.05, (before, after, control)


def test_validation_and_resume(table, tokenizer, tmp_path):
    names = list(dict.fromkeys(r["author"] for r in table))
    seen, unseen = ([r for r in table if (r["author"] in names[:-4]) == known] for known in (True, False))
    pretrainer = StylePretrainer(backbone(tokenizer), tokenizer=tokenizer, max_length=32, key=jax.random.key(1))
    options = dict(authors_per_batch=4, views=2, chunk=4, key=jax.random.key(2), validation=unseen, validation_views=8)
    whole = pretrainer.fit(seen, train=training(4, eval_every=2), **options)
    evals = [h for h in whole.history if "eval_loss" in h]
    assert [h["step"] for h in evals] == [2, 4] and 0 <= evals[0]["eval_accuracy"] <= 1

    saving = training(4, eval_every=2, checkpoint_every=2)
    pretrainer.fit(seen, train=saving, directory=tmp_path, **options)
    (newest,) = [p for p in (tmp_path / "checkpoints").iterdir() if p.name.endswith("4")]
    shutil.rmtree(newest)
    resumed = pretrainer.fit(seen, train=saving, directory=tmp_path, **options)
    params = [jf.functional(style.model)[1] for style in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_partial_tuning(table, tokenizer):
    options = dict(tokenizer=tokenizer, max_length=16, key=jax.random.key(1))
    pretrainer = StylePretrainer(backbone(tokenizer), tuned_layers=1, **options)
    fitted = pretrainer.fit(table, authors_per_batch=4, views=2, chunk=8, train=training(2), key=jax.random.key(2))
    old, new = (jf.paths.flatten(jf.functional(m)[1]) for m in (pretrainer.model, fitted.model))
    changed = {p for p in old if (old[p] != new[p]).any()}
    assert changed and all(jf.paths.matches(("layers.1.**", "head.**"), p) for p in changed)
    assert {"head.dense.kernel", "layers.1.attention.query.kernel"} <= changed


@pytest.mark.parametrize("pool", ["mean_linear", "cls_pooler"])
def test_artefact_is_a_sentence_encoder(table, tokenizer, tmp_path, pool):
    texts = [r["text"] for r in table[:12]]
    style = StylePretrainer(
        backbone(tokenizer), pool=pool, tokenizer=tokenizer, max_length=24, key=jax.random.key(1)
    ).untrained()
    style.save(tmp_path / "style")
    z = style.embed(texts)
    again = StyleModel.load(tmp_path / "style")
    np.testing.assert_allclose(again.embed(texts), z, atol=1e-6)
    assert again.settings == style.settings and again.settings["pool"] == pool
    np.testing.assert_allclose(jf.embed(jf.load(tmp_path / "style"), texts), z, atol=1e-6)  # as any encoder

    modules = json.loads((tmp_path / "style" / "modules.json").read_text())
    assert [m["type"].rsplit(".", 1)[1] for m in modules] == ["Transformer", "Pooling", "Dense"]
    batch = tokenizer(texts, max_length=24)
    hidden = np.asarray(jf.functional(style.model)[0](jf.functional(style.model)[1], batch).last_hidden_state)
    m = batch["attention_mask"][..., None]
    pooled = (hidden * m).sum(1) / m.sum(1) if pool == "mean_linear" else hidden[:, 0]
    dense = jf.functional(style.model)[1]["head"]["dense"]
    expected = pooled @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    np.testing.assert_allclose(z, np.tanh(expected) if pool == "cls_pooler" else expected, atol=1e-5)


def test_a_backbones_own_pooler_is_kept(tokenizer):
    model = backbone(tokenizer, pooler=True)
    style = StylePretrainer(model, pool="cls_pooler", tokenizer=tokenizer, key=jax.random.key(1)).untrained()
    batch = tokenizer(["def f(x): return x"])
    ours, theirs = (jf.functional(m) for m in (style.model, model))
    np.testing.assert_allclose(ours[0](ours[1], batch).pooled, theirs[0](theirs[1], batch).pooled, atol=1e-6)


def test_roberta_backbones(table, tmp_path):
    tokenizer = train_bpe([r["text"] for r in table[:50]], 400, special_tokens=("<s>", "<pad>", "</s>"))
    config = roberta.Config(tokenizer.vocab_size, 16, 1, 2, 32, max_position_embeddings=34)
    model = jf.init(config, key=jax.random.key(0))
    pretrainer = StylePretrainer(model, tokenizer=tokenizer, key=jax.random.key(1))
    assert pretrainer.settings["max_length"] == 32  # two positions serve padding
    style = pretrainer.fit(table, authors_per_batch=4, views=2, chunk=8, train=training(2), key=jax.random.key(2))
    style.save(tmp_path / "style")
    np.testing.assert_allclose(
        StyleModel.load(tmp_path / "style").embed([table[0]["text"]]), style.embed([table[0]["text"]]), atol=1e-6
    )


def test_objective_composes_with_fit(table, tokenizer):
    """The block itself, without the recipe: any model with a pooled output."""
    model = jf.init(bert.Config(tokenizer.vocab_size, 16, 1, 2, 32, max_position_embeddings=32), head="sentence",
                    key=jax.random.key(0))  # fmt: skip
    apply, params = jf.functional(model)
    data = sampler(table, tokenizer)
    run = training(5, log_every=1)
    done = fit(star_objective(4, temperature=0.07), {"model": params}, data, run, key=jax.random.key(0), apply=apply)
    records = [h["loss"] for h in done.history if "loss" in h]
    assert done.step == 5 and len(records) == 5 and np.isfinite(records).all()


def test_errors_name_the_argument(table, tokenizer):
    model, given = backbone(tokenizer), {"tokenizer": tokenizer, "key": jax.random.key(0)}
    go = lambda **options: StylePretrainer(model, **{**given, **options})
    for options, match in [
        ({"pool": "max"}, "pool: must be one of mean_linear, cls_pooler"),
        ({"loss": "triplet"}, "loss: must be 'supcon'"),
        ({"compat": "moco"}, "compat"),
        ({"compat": "star", "temperature": 0.1}, "temperature"),
        ({"temperature": 0.0}, "temperature: must be >= 0.01"),
        ({"tuned_layers": 3}, "tuned_layers: must be in 0..2"),
        ({"max_length": 65}, "max_length: must be in 1..64"),
        ({"tokenizer": None}, "tokenizer: the backbone has no directory"),
        ({"tokenizer": train_wordpiece([r["text"] for r in table], 900)}, "tokenizer: it has 900 ids"),
    ]:
        with pytest.raises(ValueError, match=match):
            go(**options)
    small = {"authors_per_batch": 4, "views": 2, "chunk": 4, "train": training(1)}
    fit_errors = lambda **options: go(max_length=16).fit(table, key=jax.random.key(0), **{**small, **options})
    for options, match in [
        ({"views": 1}, "views: must be >= 2"),
        ({"chunk": 9}, "chunk: must be in 1..8"),
        ({"authors_per_batch": 4000, "chunk": 4}, "authors_per_batch: must be in 2.."),
        ({"train": training(1, accumulate=2)}, "accumulate"),
        ({"validation": table, "validation_views": 6}, "validation_views: must be a multiple of 4"),
    ]:
        with pytest.raises(ValueError, match=match):
            fit_errors(**options)
    with pytest.raises(ValueError, match="style.json"):
        StyleModel.load("/nonexistent")


def test_a_real_sentence_encoder_as_backbone(table, minilm, tmp_path):
    pretrainer = StylePretrainer(minilm, max_length=24, tuned_layers=1, key=jax.random.key(0))
    train = training(2, learning_rate=1e-4)
    style = pretrainer.fit(table, authors_per_batch=4, views=2, chunk=8, train=train, key=jax.random.key(1))
    texts = [r["text"] for r in table[:3]]
    style.save(tmp_path / "style")
    z = jf.embed(jf.load(tmp_path / "style"), texts)
    np.testing.assert_allclose(z, style.embed(texts), atol=1e-5)
    assert z.shape == (3, 384) and np.abs(z - pretrainer.untrained().embed(texts)).max() > 1e-4
    kept = [jf.functional(m)[1]["layers"]["4"] for m in (pretrainer.model, style.model)]
    jax.tree.map(np.testing.assert_array_equal, *kept)
