"""Training of linkage and classification models: data preparation, batches, losses, and the saved artefact."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformers import functional, hub
from jaxformers.data.tokenizers import load_tokenizer, train_wordpiece
from jaxformers.tasks import linktransformer as lt
from jaxformers.tasks import linktransformer_data as ltd
from jaxformers.tasks import linktransformer_train as ltt

pd = pytest.importorskip("pandas")

NAMES = ["north wind", "blue river", "global soft", "red stone", "acme works", "zeta labs", "orion motor", "green hill",
         "silver lake", "iron gate", "golden leaf", "quick fox"]  # fmt: skip
ALIASES = ["mako", "tilo", "bero", "sani", "kuvo", "pelu", "rafi", "dome", "luxo", "quer", "wami", "zoph"]
ENDINGS = ["inc", "ltd", "corporation", "gmbh", "group"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A 1-layer encoder with random weights and its tokenizer, saved."""
    directory = tmp_path_factory.mktemp("tiny") / "encoder"
    tokenizer = train_wordpiece([f"{n} {e}" for n in NAMES + ALIASES for e in ENDINGS], 300)
    config = {
        "model_type": "bert", "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32,
        "pad_token_id": tokenizer.pad_id,
    }  # fmt: skip
    hub.save(hub.init(config, head="sentence", key=jax.random.key(0)), directory, tokenizer)
    return str(directory)


def args(tmp_path, **more):
    return {"model_save_dir": str(tmp_path), "model_save_name": "out", "train_batch_size": 16, "num_epochs": 2,
            "learning_rate": 2e-3, "max_length": 16} | more  # fmt: skip


def pairs_table():
    rows = [(f"{n} {a}", f"{n} {b}") for n in NAMES for a in ENDINGS[:2] for b in ENDINGS[2:]]
    return pd.DataFrame(rows, columns=["left", "right"])


# ------------------------------------------------------------------------------------------------------------- data


def splits(data=None, train=None, val=None, test=None, **more):
    options = dict(left_col_names=None, right_col_names=None, left_id_name=None, right_id_name=None,
                   label_col_name=None, clus_id_col_name=None, clus_text_col_names=None, val_perc=0.25,
                   test_at_end=True, val_query_prop=0.5, large_val=True, seed=0, positives_only=True,
                   sep_token=lambda: "|") | more  # fmt: skip
    return ltd.load_splits(data, train, val, test, **options)


def test_pairs_become_connected_components():
    df = pd.DataFrame({"a": ["x1", "x2", "y1", None, "z1"], "b": ["X", "X", "Y", "Y", None]})
    got = splits(df, left_col_names=["a"], right_col_names=["b"], val_perc=0)
    assert got.train == [("x1", "x2", "X"), ("y1", "Y")] and got.val is None

    by_id = pd.DataFrame({"a": ["p", "q"], "i": [1, 1], "b": ["P", "Q"], "j": [5, 6]})
    got = splits(by_id, left_col_names="a", right_col_names="b", left_id_name="i", right_id_name="j", val_perc=0)
    assert got.train == [("p", "q", "P", "Q")]


def test_several_columns_are_joined_and_duplicates_dropped():
    df = pd.DataFrame({"a": ["x", "x"], "n": [1, 1], "b": ["y", "y"]})
    got = splits(df, left_col_names=["a", "n"], right_col_names=["b"], val_perc=0)
    assert got.train == [("x|1", "y")]


def test_classes_are_split_never_cut():
    got = splits(pairs_table(), left_col_names=["left"], right_col_names=["right"])
    name = lambda text: " ".join(text.split()[:2])
    train, val, test = ({name(t) for texts in got.train for t in texts}, {name(q) for q in got.val.queries},
                        {name(q) for q in got.test.queries})  # fmt: skip
    assert len(train) == 9 and len(val) == 2 and len(test) == 1
    assert not (train & val or train & test or val & test)
    # queries are left texts, the corpus right texts, those of training as distractors
    assert all(q.split()[-1] in ENDINGS[:2] for q in got.val.queries)
    assert all(c.split()[-1] in ENDINGS[2:] for c in got.val.corpus)
    assert {name(c) for c in got.val.corpus} == train | val
    for query, relevant in zip(got.val.queries, got.val.relevant, strict=True):
        assert {got.val.corpus[i] for i in relevant} == {f"{name(query)} {e}" for e in ENDINGS[2:]}
    small = splits(pairs_table(), left_col_names=["left"], right_col_names=["right"], large_val=False)
    assert {name(c) for c in small.val.corpus} == val
    same = splits(pairs_table(), left_col_names=["left"], right_col_names=["right"], val_perc=1)
    assert len(same.train) == 12 and len(same.val.queries) == 24 and same.test is None


def test_clusters_give_queries_first():
    df = pd.DataFrame({"t": list("abcdefg"), "c": [1, 1, 1, 1, 1, 2, None]})
    got = splits(df, clus_id_col_name="c", clus_text_col_names=["t"], val_perc=1)
    assert got.train == [tuple("abcde")]
    assert got.val.queries == ("a", "b") and set(got.val.corpus) == set("cdef")


def test_labelled_pairs():
    df = pd.DataFrame({"a": list("abcdabcd"), "b": list("ABCDBADC"), "y": ["same"] * 4 + ["different"] * 4})
    got = splits(df, left_col_names=["a"], right_col_names=["b"], label_col_name="y", val_perc=1)
    assert sorted(got.train) == [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
    got = splits(df, left_col_names="a", right_col_names="b", label_col_name="y", val_perc=0, positives_only=False)
    assert got.train.labels == (1, 1, 1, 1, 0, 0, 0, 0)
    score = got.train.score(lambda texts: np.eye(4)[["ABCD".index(t.upper()) for t in texts]])
    assert score["accuracy"] == score["f1"] == score["ap"] == 1


def test_three_tables_and_files(tmp_path):
    df = pairs_table()
    df.to_csv(tmp_path / "train.csv", index=False)
    got = splits(None, str(tmp_path / "train.csv"), df[:6], left_col_names=["left"], right_col_names=["right"])
    assert len(got.train) == 12 and len(got.val.queries) == 2 and got.test is None


# ----------------------------------------------------------------------------------------------- batches and losses


def test_every_label_occurs_at_least_twice_in_a_batch():
    classes = [[f"{c}{i}" for i in range(n)] for c, n in zip("abcdefgh", (2, 3, 4, 5, 2, 2, 7, 2), strict=True)]
    stream = ltt.grouped_batches(classes, 8, 0, lambda texts: np.array(texts))
    seen = set()
    for _, batch in zip(range(40), stream, strict=False):
        labels = batch["labels"]
        assert len(labels) == 8 and (np.bincount(labels)[labels] >= 2).all()
        assert all(text[0] == "abcdefgh"[label] for text, label in zip(batch["inputs"], labels, strict=True))
        assert len(set(batch["inputs"])) == 8
        seen |= set(batch["inputs"])
    assert len(seen) == sum(map(len, classes))  # the text left over in one epoch comes in another
    again = ltt.grouped_batches(classes, 8, 0, lambda texts: np.array(texts))
    first = ltt.grouped_batches(classes, 8, 0, lambda texts: np.array(texts))
    assert (next(again)["inputs"] == next(first)["inputs"]).all()


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "roberta"])
def test_batches_hold_what_the_architecture_takes(tiny, model_type):
    tokenizer = load_tokenizer(tiny)
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8, "max_position_embeddings": 20, "dim": 8, "n_layers": 1, "n_heads": 2,
             "hidden_dim": 8, "pad_token_id": tokenizer.pad_id}  # fmt: skip
    model = hub.init({"model_type": model_type, **sizes}, head="sentence", key=jax.random.key(0))
    batch = ltd.tokenize(model, tokenizer, ["north wind " * 20, "blue"], None)
    assert batch["input_ids"].shape[1] <= 20  # never more than there are positions
    apply, params = functional(model)
    assert apply(params, batch).pooled.shape == (2, 8)


def test_triplet_loss_by_hand():
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(7, 5)), np.array([0, 0, 1, 1, 1, 2, 0])
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    d = 1 - u @ u.T
    terms = [max(d[a, p] - d[a, n] + 0.3, 0) for a in range(7) for p in range(7) for n in range(7)
             if a != p and labels[a] == labels[p] and labels[a] != labels[n]]  # fmt: skip
    got = ltt.triplet_loss(jnp.asarray(z), jnp.asarray(labels), 0.3)
    np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)
    assert ltt.triplet_loss(jnp.asarray(z), jnp.zeros(7, int)) == 0


# --------------------------------------------------------------------------------------------------------- training


def test_training_improves_retrieval_and_the_artefact_loads(tiny, tmp_path):
    out = lt.train_model(
        pairs_table(), model_path=tiny, left_col_names=["left"], right_col_names=["right"],
        training_args=args(tmp_path, num_epochs=12, val_perc=1, eval_steps_perc=0.5, warm_up_perc=1),
    )  # fmt: skip
    evaluation = json.loads((tmp_path / "out" / "LT_evaluation.json").read_text())
    losses = [r["loss"] for r in evaluation["history"] if "loss" in r]
    assert losses[-1] < 0.5 * losses[0]
    assert evaluation["after"]["mrr@10"] >= evaluation["before"]["mrr@10"]
    assert any("eval_accuracy@1" in record for record in evaluation["history"])
    settings = json.loads((tmp_path / "out" / "LT_training_config.json").read_text())
    assert settings["loss_type"] == "supcon" and settings["left_col_names"] == ["left"]
    for name in ("config.json", "model.safetensors", "modules.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).is_file(), name

    df = pd.DataFrame({"t": [f"{n} inc" for n in NAMES]})
    ref = pd.DataFrame({"t": [f"{n} group" for n in reversed(NAMES)]})
    linked = lt.merge(df, ref, on="t", model=out)
    assert np.mean([a[:-4] == b[:-6] for a, b in zip(linked["t_x"], linked["t_y"], strict=True)]) > 0.9
    again = lt.LinkTransformer(out)
    np.testing.assert_array_equal(again.encode(["blue river inc"]), lt.load_model(out).encode(["blue river inc"]))
    # its configuration can be used again
    lt.train_model(
        pairs_table(), model_path=out, left_col_names=["left"], right_col_names=["right"],
        config_path=tmp_path / "out" / "LT_training_config.json",
        training_args={"num_epochs": 1, "model_save_name": "second", "eval_steps_perc": None},
    )  # fmt: skip
    assert json.loads((tmp_path / "second" / "LT_training_config.json").read_text())["train_batch_size"] == 16


def test_chunks_give_the_same_parameters(tiny, tmp_path):
    common = dict(num_epochs=1, val_perc=0, progress=False)
    outs = []
    config = json.loads((ltt.Path(tiny) / "config.json").read_text())
    no_dropout = hub.load(tiny, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert config["hidden_dropout_prob"] == 0.1
    for chunk in (0, 5):
        out = lt.train_model(
            pairs_table(), model_path=no_dropout, left_col_names=["left"], right_col_names=["right"],
            training_args=args(tmp_path, model_save_name=f"chunk{chunk}", chunk=chunk, **common),
        )  # fmt: skip
        outs.append(lt.LinkTransformer(out).encode([f"{n} ltd" for n in NAMES]))
    np.testing.assert_allclose(outs[0], outs[1], atol=2e-4)


def labelled_table():
    """Names on the left, unrelated aliases on the right: only training can tell which belong together."""
    rng = np.random.default_rng(0)
    rows = []
    for i, name in enumerate(NAMES):
        for a in ENDINGS:
            for b in ENDINGS:
                rows.append((f"{name} {a}", f"{ALIASES[i]} {b}", 1))
                rows.append((f"{name} {a}", f"{ALIASES[(i + rng.integers(1, 12)) % 12]} {b}", 0))
    return pd.DataFrame(rows, columns=["left", "right", "same"])


@pytest.mark.parametrize("loss_type", ["onlinecontrastive", "supcon", "triplet"])
def test_labelled_pairs_train(tiny, tmp_path, loss_type):
    lt.train_model(
        labelled_table(), model_path=tiny, left_col_names=["left"], right_col_names=["right"], label_col_name="same",
        training_args=args(tmp_path, loss_type=loss_type, num_epochs=8 if loss_type == "onlinecontrastive" else 40),
    )  # fmt: skip
    evaluation = json.loads((tmp_path / "out" / "LT_evaluation.json").read_text())
    assert evaluation["before"]["ap"] < 0.7 and evaluation["after"]["ap"] > 0.9
    assert evaluation["test"]["ap"] > 0.9
    assert set(evaluation["test"]) >= {"accuracy", "f1", "ap", "f1_threshold"}


def test_interpolation_lies_between_the_weights_given_and_the_trained_ones(tiny, tmp_path):
    start = functional(hub.load(tiny))[1]
    ends, scores = {}, {}
    for share in (1.0, 0.25):
        out = lt.train_model(
            labelled_table(), model_path=tiny, left_col_names=["left"], right_col_names=["right"],
            label_col_name="same",
            training_args=args(tmp_path, num_epochs=4, interpolation=share, model_save_name=f"share{share}"),
        )  # fmt: skip
        ends[share] = functional(hub.load(out))[1]
        scores[share] = json.loads((tmp_path / f"share{share}" / "LT_evaluation.json").read_text())
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start, ends[1.0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ends[0.25], expected)
    assert scores[1.0]["before"]["ap"] == scores[0.25]["before"]["ap"]
    for part in ("after", "test"):  # both are of the average
        assert scores[1.0][part]["ap"] != scores[0.25][part]["ap"], part


def test_clusters_train(tiny, tmp_path):
    df = pd.DataFrame([(f"{n} {e}", i) for i, n in enumerate(NAMES) for e in ENDINGS], columns=["text", "cluster"])
    lt.train_model(
        train_data=df, val_data=df, model_path=tiny, clus_id_col_name="cluster", clus_text_col_names=["text"],
        training_args=args(tmp_path, num_epochs=8, large_val=False),
    )  # fmt: skip
    evaluation = json.loads((tmp_path / "out" / "LT_evaluation.json").read_text())
    assert evaluation["after"]["accuracy@1"] >= evaluation["before"]["accuracy@1"]
    assert evaluation["after"]["accuracy@1"] > 0.9


def test_classifier_trains_saves_its_names_and_classifies(tiny, tmp_path):
    df = pd.DataFrame({"t": [f"{n} {e}" for n in NAMES for e in ENDINGS]})
    df["kind"] = ["colour" if n.split()[0] in ("blue", "red", "green", "silver", "golden") else "other" for n in
                  df["t"]]  # fmt: skip
    base = hub.load(tiny, head="none")
    hub.save(base, tmp_path / "base")
    out = lt.train_clf_model(
        df, str(tmp_path / "base"), on="t", label_col_name="kind", lr=3e-3, epochs=15, eval_steps=20, max_length=16,
        model_save_dir=str(tmp_path), weighted_loss=True,
    )  # fmt: skip
    names = json.loads((tmp_path / "classification_model" / "label_map.json").read_text())
    assert sorted(names) == ["colour", "other"] and sorted(names.values()) == [0, 1]
    evaluation = json.loads((tmp_path / "classification_model" / "LT_evaluation.json").read_text())
    assert set(evaluation["test"]) == {"accuracy", "precision", "recall", "f1"}
    got = lt.classify_rows(df, "t", out)
    assert (got["clf_preds_t"] == df["kind"]).mean() > 0.9
    with pytest.raises(ValueError, match="num_labels is 3"):
        lt.classify_rows(df, "t", out, num_labels=3)


# ----------------------------------------------------------------------------------------------------------- errors

P, C = pairs_table(), pd.DataFrame({"t": ["a", "b"], "c": [1, 2]})
LR = dict(left_col_names=["left"], right_col_names=["right"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(), "either data"),
        (dict(data=P, train_data=P), "either data"),
        (dict(data=P, val_data=P, **LR), "val_data and test_data go with train_data"),
        (dict(data=P), "left_col_names and right_col_names are needed"),
        (dict(data=P, left_col_names=["left"]), "are needed"),
        (dict(data=P, left_col_names=["q"], right_col_names=["right"]), "left_col_names: data has no column 'q'"),
        (dict(data=C, clus_id_col_name="c"), "must be given together"),
        (dict(data=C, clus_id_col_name="c", clus_text_col_names=["t"], label_col_name="c"), "exclude each other"),
        (dict(data=C, clus_id_col_name="c", clus_text_col_names=["t"], left_col_names=["t"]), "do not go with cluster"),
        (dict(data=C, clus_id_col_name="c", clus_text_col_names=["t"]), "no class has two"),
        (dict(data=P.assign(y=2), label_col_name="y", **LR), "holds 2"),
        (dict(data=P.assign(y=1), label_col_name="y", **LR), "both labels"),
        (dict(data="table.parquet", **LR), "a .csv or .xlsx"),
        (dict(data="nowhere.csv", **LR), "no file"),
        (dict(data=P, training_args={"loss_type": "onlinecontrastive"}, **LR), "needs label_col_name"),
        (dict(data=P, training_args={"loss": "supcon"}, **LR), r"unknown \['loss'\]"),
        (dict(data=P, training_args={"loss_type": "arcface"}, **LR), "loss_type"),
        (dict(data=P, training_args={"train_batch_size": 7}, **LR), "train_batch_size"),
        (dict(data=P, training_args={"warm_up_perc": 1.5}, **LR), "warm_up_perc"),
        (dict(data=P, training_args={"val_perc": -0.1}, **LR), "val_perc"),
        (dict(data=P, training_args={"num_epochs": 0}, **LR), "num_epochs"),
        (dict(data=P, config_path="nowhere.json", **LR), "config_path"),
    ],
)
def test_errors_name_the_argument(call, message, monkeypatch):
    monkeypatch.setattr(ltt, "_load", lambda path: pytest.fail("the model was loaded before the input was checked"))
    with pytest.raises(ValueError, match=message):
        lt.train_model(**call)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(on="q"), "on: data has no column 'q'"),
        (dict(on=None), "on must name"),
        (dict(on="t", label_col_name="q"), "label_col_name: data has no column"),
        (dict(on="t", weight_list=[1, 1]), "weight_list needs"),
        (dict(on="t", epochs=0), "epochs must be"),
    ],
)
def test_classifier_errors(more, message):
    with pytest.raises(ValueError, match=message):
        lt.train_clf_model(pd.DataFrame({"t": ["a"] * 20, "label": [0, 1] * 10}), "nowhere", **more)
