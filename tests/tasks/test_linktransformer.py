"""LinkTransformer's tables against those of the original package, run on the same given embeddings."""

import json
import logging

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxformers as jf
from jaxformers.data.tokenizers import train_bpe
from jaxformers.tasks import linktransformer as lt

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def api(oracles):
    return json.loads((oracles / "linktransformer" / "api.json").read_text())


@pytest.fixture(scope="module")
def model(oracles, api):
    z = np.load(oracles / "linktransformer" / "api_embeddings.npz")
    table = dict(zip(json.loads(str(z["texts"])), z["embeddings"], strict=True))

    def encode(texts):
        return np.stack([table[t] for t in texts])

    encode.sep_token = api["sep_token"]
    return encode


def frame(table):
    return pd.DataFrame(table["data"], columns=table["columns"], index=table["index"])


def assert_same(got, table, keep_order=True):
    expected = frame(table)
    assert list(got.columns) == list(expected.columns)
    if keep_order:
        assert list(got.index) == list(expected.index)
    else:
        keys = [c for c in expected.columns if c.startswith(("name", "id_lt"))]
        got, expected = (t.sort_values(keys).reset_index(drop=True) for t in (got, expected))
    assert len(got) == len(expected)
    for column in expected.columns:
        a, b = got[column], expected[column]
        if column == "score":
            np.testing.assert_allclose(a.astype(float), b.astype(float), atol=1e-5)
        else:
            assert (a.isna().to_numpy() == b.isna().to_numpy()).all(), column
            assert [x for x in a if not pd.isna(x)] == [x for x in b if not pd.isna(x)], column


@pytest.fixture(params=["name", "name|country"])
def case(request, api):
    return api[request.param]


@pytest.fixture(params=["exact", "blocked"])
def engine(request):
    return request.param


# ------------------------------------------------------------------------------------------- against the original


def test_merge(api, model, case, engine):
    df1, df2 = frame(api["df1"]), frame(api["df2"])
    before = df1.copy(), df2.copy()
    assert_same(lt.merge(df1, df2, on=case["on"], model=model, engine=engine), case["merge"])
    pd.testing.assert_frame_equal(df1, before[0])
    pd.testing.assert_frame_equal(df2, before[1])


def test_merge_knn(api, model, case, engine):
    df1, df2 = frame(api["df1"]), frame(api["df2"])
    common = dict(on=case["on"], model=model, k=case["k"], engine=engine)
    assert_same(lt.merge_knn(df1, df2, **common), case["merge_knn"])
    assert_same(lt.merge_knn(df1, df2, **common, drop_sim_threshold=case["threshold"]), case["merge_knn_drop"])


def test_merge_range(api, model, case, engine):
    df1, df2 = frame(api["df1"]), frame(api["df2"])
    got = lt.merge_range(df1, df2, on=case["on"], model=model, sim_threshold=case["threshold"], engine=engine)
    assert_same(got, case["merge_range"], keep_order=False)
    assert list(got.index) == list(range(len(got))) and got["id_lt_x"].is_monotonic_increasing
    assert all(group["score"].is_monotonic_decreasing for _, group in got.groupby("id_lt_x"))


def test_merge_blocking(api, model, case, engine):
    df1, df2 = frame(api["df1"]), frame(api["df2"])
    got = lt.merge_blocking(df1, df2, on=case["on"], model=model, blocking_vars=case["blocking_vars"], engine=engine)
    assert_same(got, case["merge_blocking"], keep_order=False)
    # blocks in order of first appearance in df1, then unmatched left, then unmatched right rows
    assert list(got["country_x"].dropna().unique()) == ["US", "IN", "DE", "BR", "FR"]
    assert list(got["name"].dropna()) == ["Orion Motors", "Omega Ship"]


def test_suffixes(api, model, case):
    df1, df2 = frame(api["df1"]), frame(api["df2"])
    got = lt.merge(df1, df2, on=case["on"], model=model, suffixes=("_l", "_r"))
    assert list(got.columns) == case["merge_suffixes"]


def test_pairs(api, model):
    table = frame(api["evaluate_pairs"])
    got = lt.evaluate_pairs(table.drop(columns="score"), model, left_on="a", right_on="b")
    assert_same(got, api["evaluate_pairs"])
    n = round(len(api["all_pair_combos"]["data"]) ** 0.5)
    got = lt.all_pair_combos_evaluate(table.drop(columns="score")[:n], model, left_on="a", right_on="b")
    assert_same(got, api["all_pair_combos"])


@pytest.mark.parametrize("number", range(8))
def test_clusters_and_dedup(api, model, number):
    df, case = frame(api["cluster_input"]), api["cluster"][number]
    on, params = api["cluster_on"], dict(case["params"])
    got = lt.cluster_rows(df, model, on, case["type"], params)["cluster"].to_numpy()
    expected = np.array(case["labels"])
    np.testing.assert_array_equal(got == -1, expected == -1)
    renumbered = {}
    for a, b in zip(got, expected, strict=True):
        assert renumbered.setdefault(a, b) == b
    assert len(set(renumbered.values())) == len(renumbered)

    compat = lt.dedup_rows(df, model, on, case["type"], params, compat="linktransformer")
    assert list(compat.index) == case["official_dedup_index"]
    ours = lt.dedup_rows(df, model, on, case["type"], params)
    assert list(ours.columns) == list(df.columns)
    distinct = df.drop_duplicates(on)
    label = lt.cluster_rows(distinct, model, on, case["type"], params)["cluster"]
    first = [i for i in distinct.index if label[i] == -1 or i == label.index[label == label[i]][0]]
    assert list(ours.index) == first  # noise rows are kept, every one


# ------------------------------------------------------------------------------------------------------ properties


def letters(texts):
    """A toy encoder: hashed character pairs and a bias, so that no text is a zero vector."""
    z = np.zeros((len(texts), 64), np.float32)
    for i, text in enumerate(texts):
        padded = f"^{text}$"
        for a, b in zip(padded, padded[1:], strict=False):
            z[i, (ord(a) * 31 + ord(b)) % 63] += 1
        z[i, 63] = 0.1
    return z


text = st.text("abc ", min_size=0, max_size=5)


@given(st.lists(text, min_size=0, max_size=8), st.lists(text, min_size=1, max_size=9))
def test_cross_checks(left, right):
    df1, df2 = pd.DataFrame({"t": pd.Series(left, dtype=object)}), pd.DataFrame({"t": right, "n": range(len(right))})
    one = lt.merge(df1, df2, on="t", model=letters)
    pd.testing.assert_frame_equal(one, lt.merge_knn(df1, df2, on="t", model=letters, k=1))
    pd.testing.assert_frame_equal(one, lt.merge(df1, df2, on="t", model=letters, engine="blocked"))
    assert len(one) == len(left) and list(one["t_x"]) == left
    assert len(lt.merge_range(df1, df2, on="t", model=letters, sim_threshold=-1)) == len(left) * len(right)
    exact = lt.merge_range(df1, df2, on="t", model=letters, sim_threshold=1).dropna(subset=["score"])
    assert {(a, b) for a, b in zip(exact["t_x"], exact["t_y"], strict=True)} >= {(t, t) for t in left if t in right}
    assert (exact["score"] == 1).all()

    back = lt.merge(df1, df2[::-1], on="t", model=letters)
    np.testing.assert_allclose(back["score"], one["score"], atol=1e-6)
    for got, text_left in zip(one.itertuples(), left, strict=True):
        if text_left in right:
            assert got.score == 1 and got.id_lt_y <= right.index(text_left)

    every = lt.merge_knn(df1, df2, on="t", model=letters, k=len(right))
    assert len(every) == len(left) * len(right)
    assert all(sorted(g["id_lt_y"]) == list(range(len(right))) for _, g in every.groupby("id_lt_x"))


@given(st.lists(text, min_size=0, max_size=14), st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.3]))
def test_dedup_is_idempotent(texts, least, threshold):
    df = pd.DataFrame({"t": pd.Series(texts, dtype=object)})
    params = {"threshold": threshold, "min cluster size": least}
    once = lt.dedup_rows(df, letters, "t", cluster_params=params)
    if least <= 2:
        pd.testing.assert_frame_equal(lt.dedup_rows(once, letters, "t", cluster_params=params), once)
    assert once["t"].is_unique and set(once["t"]) <= set(texts) and set(once.index) <= set(df.index)
    assert params == {"threshold": threshold, "min cluster size": least}


def test_each_distinct_text_is_embedded_once():
    seen = []

    def model(texts):
        seen.extend(texts)
        return letters(texts)

    df1 = pd.DataFrame({"t": ["a", "b", "a", "c"]})
    df2 = pd.DataFrame({"t": ["b", "b", "d"]})
    lt.merge(df1, df2, model=model, batch_size=2)
    assert sorted(seen) == ["a", "b", "c", "d"]


def test_blocking_keys_with_nulls_and_nothing_in_common():
    df1 = pd.DataFrame({"t": ["a", "b", "c"], "g": [1, None, 2]})
    df2 = pd.DataFrame({"t": ["a", "b"], "g": [None, 1]}, index=[9, 9])
    got = lt.merge_blocking(df1, df2, on="t", model=letters, blocking_vars="g")
    assert got["t_x"].dropna().tolist() == ["a"] and got["t_y"].dropna().tolist() == ["b"]
    assert got["t"].dropna().tolist() == ["b", "c", "a"] and list(got.index) == [0, 1, 2, 3]
    nothing = lt.merge_blocking(df1[2:], df2, on="t", model=letters, blocking_vars=["g"])
    assert nothing["score"].isna().all() and len(nothing) == 3
    plain = lt.merge_blocking(df1, df2, on="t", model=letters)
    pd.testing.assert_frame_equal(plain, lt.merge(df1, df2, on="t", model=letters))


def test_texts_of_rows(caplog):
    df = pd.DataFrame(
        {
            "i": [1999, 2005],
            "f": np.array([0.1, np.nan], np.float32),
            "s": ["é", None],
            "d": pd.to_datetime(["2020-01-02", None]),
            "c": pd.Categorical(["x", "y"]),
        }
    )
    assert lt.serialize_columns(df, ["i", "f", "s", "d", "c"], "|") == ["1999|0.1|é|2020-01-02 00:00:00|x", "2005||||y"]
    assert lt.serialize_columns(df, "i") == ["1999", "2005"]
    assert lt.serialize_columns(df, ["i", "c"]) == ["1999</s>x", "2005</s>y"]

    letters_sep = lt.LinkTransformer(letters, sep_token="[SEP]")
    assert lt.serialize_columns(df, ["i", "c"], model=letters_sep) == ["1999[SEP]x", "2005[SEP]y"]
    with caplog.at_level(logging.WARNING, "jaxformers"):
        lt.cluster_rows(df, letters, "s")
    assert "holds 1 nulls" in caplog.text


def test_columns_keep_their_types_and_left_and_right_may_differ_in_kind():
    df1 = pd.DataFrame(
        {"a": ["x", "y"], "n": [1, 2], "when": pd.to_datetime(["2020-01-01", "2021-01-01"])}, index=[5, 5]
    )
    df2 = pd.DataFrame({"b": ["x", "z"], "c": ["u", "v"], "flag": [True, False], "k": pd.array([1, None], "Int64")})
    got = lt.merge(df1, df2, left_on="a", right_on=["b", "c"], model=letters)
    assert got.dtypes["n"] == df1.dtypes["n"] and got.dtypes["when"] == df1.dtypes["when"]
    assert got.dtypes["flag"].kind == "b" and str(got.dtypes["k"]) == "Int64" and got.dtypes["id_lt_y"] == np.int64
    assert list(got.index) == [0, 1]
    reverse = lt.merge(df2, df1, left_on=["b", "c"], right_on="a", model=letters)
    assert len(reverse) == 2


def test_aggregate_is_merge_onto_the_reference():
    fine = pd.DataFrame({"fine": ["red apple", "green pear"], "id": [1, 2]})
    coarse = pd.DataFrame({"coarse": ["pear", "apple"], "id": [7, 8]})
    got = lt.aggregate_rows(fine, coarse, letters, left_on="fine", right_on="coarse")
    assert got["coarse"].tolist() == ["apple", "pear"] and got["id_y"].tolist() == [8, 7]


def test_empty_left_table_and_clipped_k(caplog):
    df1, df2 = pd.DataFrame({"t": pd.Series([], dtype=str)}), pd.DataFrame({"t": ["a", "b"]})
    for got in (lt.merge(df1, df2, model=letters), lt.merge_range(df1, df2, model=letters)):
        assert len(got) == 0 and list(got.columns) == ["t_x", "id_lt_x", "t_y", "id_lt_y", "score"]
    with caplog.at_level(logging.WARNING, "jaxformers"):
        got = lt.merge_knn(df2, df2, model=letters, k=5)
    assert len(got) == 4 and "clipped" in caplog.text


def test_merge_type_only_warns(caplog):
    df = pd.DataFrame({"t": ["a", "a"]})
    with caplog.at_level(logging.WARNING, "jaxformers"):
        got = lt.merge(df, pd.DataFrame({"t": ["a"]}), "1:m", model=letters)
    assert len(got) == 2 and "duplicates" in caplog.text
    caplog.clear()
    lt.merge(df, pd.DataFrame({"t": ["a"]}), "m:1", model=letters)
    assert not caplog.text


def test_judge():
    df1, df2 = pd.DataFrame({"t": ["ab", "cd"]}), pd.DataFrame({"t": ["ab", "cc"]})
    asked = []

    def probability(left, right):
        asked.append(len(left))
        return [0.9 if a == b else 0.2 for a, b in zip(left, right, strict=True)]

    got = lt.merge_k_judge(df1, df2, model=letters, k=2, judge=probability, batch_size=3)
    assert asked == [3, 1]
    assert got["llm_is_match"].tolist() == [int(a == b) for a, b in zip(got["t_x"], got["t_y"], strict=True)]
    np.testing.assert_allclose(sorted(got["llm_confidence"]), [0.8, 0.8, 0.8, 0.9])
    kept = lt.merge_k_judge(df1, df2, model=letters, k=2, judge=probability, confidence_threshold=0.85)
    assert kept[["t_x", "t_y"]].to_numpy().tolist() == [["ab", "ab"]]
    got = lt.merge_k_judge(df1, df2, model=letters, k=1, judge=lambda a, b: [(1, 0.6, "yes")] * len(a))
    assert got["llm_raw_response"].tolist() == ["yes", "yes"]
    with pytest.raises(ValueError, match="judge returned 1"):
        lt.merge_k_judge(df1, df2, model=letters, judge=lambda a, b: [0.5])
    with pytest.raises(ValueError, match="probabilities"):
        lt.merge_k_judge(df1, df2, model=letters, judge=lambda a, b: [1.5] * len(a))


def test_classify_rows_with_a_function():
    df = pd.DataFrame({"t": ["aa", "b", "aa"], "u": [1, 2, 3]})

    def logits(texts):
        return np.array([[len(t) == 1, len(t) == 2] for t in texts], np.float32)

    assert lt.classify_rows(df, "t", logits)["clf_preds_t"].tolist() == [1, 0, 1]
    named = lt.classify_rows(df, "t", logits, label_map={"short": 0, "long": 1})
    assert named["clf_preds_t"].tolist() == ["long", "short", "long"]
    assert "clf_preds_t-u" in lt.classify_rows(df, ["t", "u"], logits)
    with pytest.raises(ValueError, match="label_map has 2"):
        lt.classify_rows(df, "t", logits, num_labels=3, label_map={"short": 0, "long": 1})
    with pytest.raises(ValueError, match="num_labels is 3"):
        lt.classify_rows(df, "t", logits, num_labels=3)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        lt.classify_rows(df, "t", logits, label_map={"short": 1, "long": 2})
    with pytest.raises(ValueError, match="model must be"):
        lt.classify_rows(df, "t")


def test_transform_rows():
    df = pd.DataFrame({"t": ["a", None, "b"], "n": [1, 2, 3]}, index=[4, 5, 6])
    got = lt.transform_rows(df, "t", lambda texts: [t.upper() for t in texts], batch_size=1)
    assert got["transformed_t"].tolist() == ["A", "B"] and list(got.index) == [4, 6]
    got = lt.transform_rows(df, ["t", "n"], lambda texts: texts, output_column="both")
    assert got["both"].tolist() == ["a 1", "b 3"]
    with pytest.raises(ValueError, match="returned 1 texts for 2"):
        lt.transform_rows(df, "t", lambda texts: texts[:1])
    with pytest.raises(ValueError, match="or a sequence-to-sequence model, got int"):
        lt.transform_rows(df, "t", 3)


def test_transform_rows_by_a_sequence_to_sequence_model(tmp_path):
    texts = ["one two", None, "two three", "one two"]
    tokenizer = train_bpe([text for text in texts if text], vocab_size=270)
    t5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = {**t5, "vocab_size": tokenizer.vocab_size, "decoder_start_token_id": 0}
    model = jf.init(config, head="seq2seq_lm", key=jax.random.key(0))
    jf.save(model, tmp_path / "t5", tokenizer=tokenizer)
    found = lt.transform_rows(pd.DataFrame({"t": texts}), "t", tmp_path / "t5", batch_size=2, max_new_tokens=5)
    alone = jf.generate(jf.load(tmp_path / "t5"), ["one two", "two three"], max_new_tokens=5)
    assert found["transformed_t"].tolist() == [alone[0], alone[1], alone[0]]
    with pytest.raises(ValueError, match="writes no text"):
        lt.transform_rows(pd.DataFrame({"t": texts}), "t", jf.load(tmp_path / "t5", head="none"))


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        lt.merge(A, B, on="t", model=tmp_path)


def test_column_names_need_not_be_strings():
    df1, df2 = pd.DataFrame({0: ["a", "b"], 1: [1, 2]}), pd.DataFrame({0: ["b", "a"]})
    assert lt.merge(df1, df2, on=0, model=letters)["id_lt_y"].tolist() == [1, 0]
    assert lt.all_pair_combos_evaluate(df1, letters, 0, 1)["right_on"].tolist() == [1, 2, 1, 2]
    assert "clf_preds_0" in lt.classify_rows(df1, 0, lambda texts: np.eye(2)[[0] * len(texts)])


A, B = pd.DataFrame({"t": ["a", "b"], "x": [1, 2]}), pd.DataFrame({"t": ["a"], "y": [1]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lt.merge(A, B, on="q", model=letters), "left_on: df1 has no column 'q'"),
        (lambda: lt.merge(A, B, left_on="t", right_on="q", model=letters), "right_on: df2 has no column 'q'"),
        (lambda: lt.merge(A, B, left_on="t", model=letters), "right_on is missing"),
        (lambda: lt.merge(A[["x"]], B, model=letters), "no column in common"),
        (lambda: lt.merge(A, B, on=[], model=letters), "at least one column"),
        (lambda: lt.merge(A.assign(id_lt=0), B, on="t", model=letters), "df1 has a column 'id_lt'"),
        (lambda: lt.merge(A, B.assign(id_lt=0), on="t", model=letters), "df2 has a column 'id_lt'"),
        (lambda: lt.merge(A.assign(score=0), B, on="t", model=letters), "two columns 'score'"),
        (lambda: lt.merge(A, B, on="t", model=letters, suffixes=("", "")), "two columns"),
        (lambda: lt.merge(A, B[:0], on="t", model=letters), "df2 is empty"),
        (lambda: lt.merge(A, B, "m:m", on="t", model=letters), "merge_type"),
        (lambda: lt.merge(A, B, on="t", model=letters, engine="faiss"), "engine"),
        (lambda: lt.merge(A, B, on="t", model=letters, batch_size=0), "batch_size"),
        (lambda: lt.merge(A, B, on="t", model=3), "model must be"),
        (lambda: lt.merge(A, B, on="t", model=lambda t: np.ones(3)), "model must return"),
        (lambda: lt.merge(A, B, on="t", model=lambda t: np.full((len(t), 2), np.nan)), "NaN or infinite"),
        (lambda: lt.merge([1], B, on="t", model=letters), "df1 must be a pandas DataFrame"),
        (lambda: lt.merge(A.rename(columns={"x": "t"}), B, on="t", model=letters), "two columns|twice"),
        (lambda: lt.merge_knn(A, B, on="t", model=letters, k=0), "k must be"),
        (lambda: lt.merge_knn(A, B, on="t", model=letters, drop_sim_threshold=2), "drop_sim_threshold"),
        (lambda: lt.merge_range(A, B, on="t", model=letters, sim_threshold=1.01), "sim_threshold"),
        (lambda: lt.merge_blocking(A, B, on="t", model=letters, blocking_vars="x"), "blocking_vars: df2"),
        (lambda: lt.evaluate_pairs(A, letters, left_on="t"), "right_on must name"),
        (lambda: lt.evaluate_pairs(A.assign(score=1), letters, "t", "x"), "already has a column 'score'"),
        (lambda: lt.cluster_rows(A, letters), "on must name"),
        (lambda: lt.cluster_rows(A, letters, "t", "kmeans"), "cluster_type"),
        (lambda: lt.cluster_rows(A.assign(cluster=1), letters, "t"), "already has a column 'cluster'"),
        (lambda: lt.dedup_rows(A, letters, "t", compat="yes"), "compat"),
        (lambda: lt.merge_k_judge(A, B, on="t", model=letters, judge=None), "judge must be"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
