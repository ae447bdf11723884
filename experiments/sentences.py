"""Short texts with labels, for the experiments that compare classifiers."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments import common
from jaxformers.data.text import python_sources, read_records


def labelled_texts(given: Path | None, rows: int) -> dict[str, Any]:
    """{"task": its name, "train": (texts, labels), "dev": (texts, labels)}, `rows` of each at most.

    `given`: a directory with train.tsv and dev.tsv (.gz allowed), sentence and label; by default SST-2 where
    sst2_small lies beside the repository, else: from which package of the standard library is this line of code?
    """
    root = common.shared_data("sst2_small", given)
    if root is not None:
        parts = {}
        for part in ("train", "dev"):
            file = next(f for f in (root / f"{part}.tsv.gz", root / f"{part}.tsv") if f.exists())
            records = read_records(file)[:rows]
            parts[part] = [r["sentence"] for r in records], np.array([int(r["label"]) for r in records])
        return {"task": "SST-2", **parts}
    lines, labels = [], []
    packages = ("asyncio", "email", "tkinter", "xml", "multiprocessing", "distutils")
    for name, source in python_sources().items():
        package = name.split("/")[0]
        if package in packages:
            kept = [line.strip() for line in source.splitlines() if len(line.split()) > 3]
            lines += kept
            labels += [packages.index(package)] * len(kept)
    order = np.random.default_rng(0).permutation(len(lines))
    lines, labels = [lines[i] for i in order], np.array(labels)[order]
    cut = min(len(lines) * 9 // 10, rows)
    end = cut + min(cut, 2000)
    parts = {"train": (lines[:cut], labels[:cut]), "dev": (lines[cut:end], labels[cut:end])}
    return {"task": "package of a line of code", **parts}
