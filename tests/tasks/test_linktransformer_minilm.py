"""LinkTransformer with the real all-MiniLM-L6-v2 on real tables."""

import gzip
import re

import numpy as np
import pytest

from jaxformers import link as lt

pd = pytest.importorskip("pandas")


def test_links_by_name(minilm):
    df1 = pd.DataFrame(
        {"company": ["Harbour Technologies Inc", "Blue River Foods", "Bank of Orion"], "country": ["US", "BR", "JP"]}
    )
    df2 = pd.DataFrame(
        {"company": ["Orion Banking Corp.", "Harbor Tech", "BlueRiver Food SA"], "country": ["JP", "US", "BR"]}
    )
    got = lt.merge(df1, df2, on="company")
    assert got["id_lt_y"].tolist() == [1, 2, 0]
    assert lt.load_model("all-MiniLM-L6-v2").sep_token == "[SEP]"
    both = lt.merge(df1, df2, model=minilm)
    assert both["id_lt_y"].tolist() == [1, 2, 0] and (both["score"] > got["score"]).all()


def test_coarse_categories(minilm):
    fine = pd.DataFrame({"item": ["Laptop computer", "Kitchen appliance", "Denim jeans", "Smartphone", "Winter coat"]})
    coarse = pd.DataFrame({"category": ["Electronics", "Household appliances", "Clothing"]})
    got = lt.aggregate_rows(fine, coarse, left_on="item", right_on="category")
    assert got["category"].tolist() == ["Electronics", "Household appliances", "Clothing", "Electronics", "Clothing"]


def test_deduplicates_spellings(minilm):
    df = pd.DataFrame({"name": ["Acme Corporation", "ACME Corp.", "Zeta Laboratories", "Zeta Labs", "Green Hill Farm"]})
    kept = lt.dedup_rows(df, on="name", cluster_params={"threshold": 0.3, "min cluster size": 2, "metric": "cosine"})
    assert kept.index.tolist() == [0, 2, 4]


@pytest.mark.slow
def test_dirty_records_beat_string_matching(minilm, shared):
    """The 27 matches of the test split of dirty iTunes-Amazon look for their partner among all 483 right records."""
    folder = shared / "data" / "er_magellan_small" / "Dirty" / "iTunes-Amazon"
    rows = {}
    for part in ("train", "valid", "test"):
        with gzip.open(folder / f"{part}.txt.gz", "rt", encoding="utf-8") as lines:
            rows[part] = [line.rstrip("\n").split("\t") for line in lines]

    def values(record):
        return " ".join(v for v in (part.strip() for part in re.split(r"COL \S+ VAL", record)) if v)

    right = pd.DataFrame({"song": list(dict.fromkeys(values(r) for part in rows.values() for _, r, _ in part))})
    matches = [(values(left), values(r)) for left, r, y in rows["test"] if y == "1"]
    queries = pd.DataFrame(matches, columns=["song", "partner"])
    assert (len(queries), len(right)) == (27, 483)

    tfidf = pytest.importorskip("sklearn.feature_extraction.text").TfidfVectorizer(analyzer="char", ngram_range=(3, 3))
    tfidf.fit(right["song"])
    strings = lt.merge(queries, right, on="song", model=lambda texts: tfidf.transform(texts).toarray())
    neural = lt.merge(queries, right, on="song")
    accuracy = [np.mean(got["partner"] == got["song_y"]) for got in (strings, neural)]
    np.testing.assert_allclose(accuracy, [21 / 27, 24 / 27])
