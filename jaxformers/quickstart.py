"""``jaxformers quickstart``: pre-train, compress and apply a small language model, on text that every Python ships.

The arc of the library on real input, in minutes on two CPU cores and without a network:

1. :func:`pretrain`: a BPE tokenizer and a llama on the Python reference (English) and the standard library's sources;
2. :func:`compress`: RTN and GPTQ at 8, 4, 3 and 2 bits, judged on files that were held out, saved and reloaded;
3. :func:`apply`: text from the 4-bit model, and two tables linked by a sentence encoder where one is found.
"""

import dataclasses
import inspect
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxformers as jf
from jaxformers import losses
from jaxformers.atomic import write_json_atomic
from jaxformers.compress.gptq import gptq
from jaxformers.data import batches, text
from jaxformers.data.tokenizers import Tokenizer, train_bpe
from jaxformers.evaluation import perplexity
from jaxformers.extras import require
from jaxformers.models import llama
from jaxformers.safetensors_io import CheckpointError
from jaxformers.train import OptimConfig, TrainConfig, fit

ENCODER = "all-MiniLM-L6-v2"
PROMPTS = ("The value of the expression is", "    def __init__(self", "When an exception occurs")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes that fit three minutes on two cores. ``length`` tokens a sequence, ``batch`` sequences a step."""

    vocab: int = 1024
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp: int = 384
    length: int = 128
    batch: int = 8
    steps: int = 700
    source_bytes: int = 1_200_000
    calibration: int = 32
    bits: tuple[int, ...] = (8, 4, 3, 2)
    group_size: int = 64
    eval_windows: int = 64


def run(out: Path, *, seed: int = 0, settings: Settings = Settings()) -> dict[str, Any]:
    """The whole arc; everything it makes lies under ``out``. Returns what ``result.json`` holds."""
    require("matplotlib", "demo"), require("pandas", "demo"), require("sklearn", "demo")
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=100)
    console.rule("1 · pre-train")
    train_text, held_out = corpus(settings)
    model, tokenizer, train_ids, test_ids, history = pretrain(out, train_text, held_out, settings, seed)
    console.rule("2 · compress")
    rows, small = compress(out, model, tokenizer, train_ids, test_ids, settings, seed, console)
    console.rule("3 · apply")
    samples = apply(small, console)
    linked = link(console)
    result = {"models": rows, "samples": samples, "linking": linked, "seconds": round(time.perf_counter() - began, 1)}
    write_json_atomic(out / "result.json", result)
    draw(out / "quickstart.png", history, rows)
    show(console, rows, linked)
    console.print(f"{result['seconds']:.0f} s; the 4-bit checkpoint, table and figure are in {out}")
    return result


# ---- 1. pre-train --------------------------------------------------------------------------------------------------


def corpus(settings: Settings) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts): whole topics and whole files on one side or the other."""
    parts = [text.split_documents(d) for d in (text.english_text(), text.python_sources(settings.source_bytes))]
    train = [document for part in parts for document in part[0].values()]
    return train, [document for part in parts for document in part[1].values()]


def pretrain(
    out: Path, train_text: list[str], held_out: list[str], settings: Settings, seed: int
) -> tuple[nnx.Module, Tokenizer, np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """A llama trained from nothing. Returns it with its tokenizer, both token streams and the training history."""
    tokenizer = train_bpe(train_text, settings.vocab, max_length=settings.length)
    train_ids, test_ids = (
        text.join_documents([tokenizer.encode(document) for document in documents], tokenizer.eos_id)
        for documents in (train_text, held_out)
    )
    config = llama.Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        intermediate_size=settings.mlp,
        max_position_embeddings=settings.length,
        initializer_range=0.05,  # a narrow model starts faster with larger weights
        tie_word_embeddings=True,
    )
    model = jf.init(config, head="causal_lm", key=jax.random.key(seed))
    data = batches.token_batches(train_ids, settings.length, settings.batch, seed=seed)
    test = text.windows(test_ids, settings.length)[: settings.eval_windows]
    eval_data = [{"input_ids": rows} for rows in np.array_split(test, max(1, len(test) // settings.batch))]
    every = max(1, settings.steps // 6)
    train_config = TrainConfig(
        steps=settings.steps,
        optim=OptimConfig(learning_rate=3e-3, schedule="cosine", warmup=settings.steps // 20, weight_decay=0.1),
        scan_layers=True,
        eval_every=every,
        log_every=max(1, settings.steps // 30),
    )
    result = fit(next_token, model, data, train_config, key=jax.random.key(seed + 1), eval_data=eval_data)
    with open(out / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in result.history)
    return result.model, tokenizer, train_ids, test_ids, result.history


def next_token(apply: Any, params: Any, batch: dict[str, jax.Array], key: Any) -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross-entropy of each token given those before it."""
    logits = apply(params, batch, rngs=key).logits
    return losses.cross_entropy(logits[:, :-1], batch["input_ids"][:, 1:]), {}


# ---- 2. compress ---------------------------------------------------------------------------------------------------


def compress(
    out: Path,
    model: nnx.Module,
    tokenizer: Tokenizer,
    train_ids: np.ndarray,
    test_ids: np.ndarray,
    settings: Settings,
    seed: int,
    console: Console,
) -> tuple[list[dict[str, Any]], nnx.Module]:
    """Quantise at each number of bits both ways. Returns the table's rows and the reloaded 4-bit GPTQ model."""
    calibration = text.random_windows(train_ids, settings.calibration, settings.length, seed=seed)
    test = test_ids[: settings.eval_windows * settings.length]
    rows: list[dict[str, Any]] = []
    small = None

    def judge(name: str, bits: int, candidate: nnx.Module, seconds: float) -> nnx.Module:
        directory = out / name
        jf.save(candidate, directory, tokenizer=tokenizer)
        loaded = jf.load(directory)
        quality = perplexity(loaded, test, settings.length)
        rows.append({
            "model": name, "bits": bits, "perplexity": round(float(quality), 3),
            "bytes": (directory / "model.safetensors").stat().st_size,
            "tokens_per_second": round(decode_speed(loaded, tokenizer)), "seconds_to_quantise": round(seconds, 1),
        })  # fmt: skip
        before = float(perplexity(candidate, test, settings.length))
        if not np.isclose(before, quality, rtol=1e-5):
            raise RuntimeError(f"{name}: perplexity {before} before saving, {quality} after loading")
        console.print(f"{name}: perplexity {quality:.3f}, {rows[-1]['bytes']:,} bytes")
        return loaded

    judge("float32", 32, model, 0.0)
    for bits in settings.bits:
        for method in ("rtn", "gptq"):
            began = time.perf_counter()
            packed = gptq(model, calibration, bits=bits, group_size=settings.group_size, method=method)
            loaded = judge(f"{method}-{bits}bit", bits, packed, time.perf_counter() - began)
            small = loaded if (method, bits) == ("gptq", 4) else small
    return rows, small


def decode_speed(model: nnx.Module, tokenizer: Tokenizer, rows: int = 8, tokens: int = 48) -> float:
    """Tokens per second of cached greedy decoding, ``rows`` texts at once, compilation excluded."""
    prompts = [tokenizer.encode(PROMPTS[i % len(PROMPTS)]) for i in range(rows)]
    once = lambda: jf.generate(model, prompts, max_new_tokens=tokens, eos_token_id=())  # noqa: E731
    once()
    began = time.perf_counter()
    once()
    return rows * tokens / (time.perf_counter() - began)


# ---- 3. apply ------------------------------------------------------------------------------------------------------


def apply(model: nnx.Module, console: Console) -> dict[str, str]:
    """Continuations by the 4-bit model."""
    texts = jf.generate(model, list(PROMPTS), max_new_tokens=24, temperature=0.7, top_k=40, key=jax.random.key(0))
    for prompt, continuation in zip(PROMPTS, texts, strict=True):
        console.print(f"[bold]{prompt}[/bold]{continuation!r}", markup=True)
    return dict(zip(PROMPTS, texts, strict=True))


def docstring_tables() -> tuple[list[str], list[str], list[int]]:
    """What functions of ``math``, ``cmath``, ``statistics`` and ``str`` say of themselves, what their NumPy namesakes
    say, and which belongs to which: (left, right, index into right for each left). Names are removed."""
    import cmath
    import math
    import statistics

    left, right, truth = [], [], []
    for module, homes in ((math, (np,)), (cmath, (np,)), (statistics, (np,)), (str, (np.strings, np.char))):
        for name in sorted(n for n in dir(module) if not n.startswith("_")):
            ours = getattr(module, name)
            theirs = next((getattr(home, name) for home in homes if callable(getattr(home, name, None))), None)
            borrowed = getattr(ours, "__module__", None) not in (module.__name__, None) and module is not str
            if theirs is None or borrowed or not callable(ours):
                continue
            one, other = _first_sentence(ours, name), _first_sentence(theirs, name)
            if one and other:
                left.append(one)
                if other not in right:
                    right.append(other)
                truth.append(right.index(other))
    return left, right, truth


def _first_sentence(function: Any, name: str) -> str:
    """The first sentence of a docstring without its signature, ``name`` removed."""
    paragraphs = [" ".join(p.split()) for p in inspect.cleandoc(function.__doc__ or "").split("\n\n")]
    prose = [p for p in paragraphs if p and not re.match(r"^[\w.]*\(.*\)( -> .*)?$", p)]
    sentence = re.split(r"(?<=[.!?])\s", prose[0])[0] if prose else ""
    return " ".join(re.sub(rf"(?i)\b{re.escape(name)}\b", "", sentence).split())


def link(console: Console) -> list[dict[str, Any]]:
    """Accuracy@1 of linking the two tables by a sentence encoder in float32 and 4 bits, and by trigram TF-IDF."""
    left, right, truth = docstring_tables()
    sklearn_text = require("sklearn.feature_extraction.text", "demo")
    tfidf = sklearn_text.TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3)).fit([*left, *right])
    scores = (tfidf.transform(left) @ tfidf.transform(right).T).toarray()
    rows = [_accuracy("character-trigram TF-IDF", scores, truth)]
    try:
        encoder = jf.load(ENCODER)
    except CheckpointError as error:
        console.print(f"no sentence encoder to link with: {error}")
        return rows
    calibration = jf.load_tokenizer(encoder.source)([*left, *right], max_length=64)
    packed = gptq(encoder, calibration, bits=4, group_size=64)
    for name, model in ((f"{ENCODER} float32", encoder), (f"{ENCODER} 4-bit GPTQ", packed)):
        a, b = jf.embed(model, left), jf.embed(model, right)
        rows.append(_accuracy(name, a @ b.T, truth))
    best = rows[1]["picked"]
    for i in range(0, len(left), len(left) // 4):
        mark = "=" if best[i] == truth[i] else "≠"
        console.print(f"{left[i][:50]!r} {mark} {right[best[i]][:50]!r}", markup=False)
    return rows


def _accuracy(name: str, scores: np.ndarray, truth: list[int]) -> dict[str, Any]:
    picked = np.argmax(scores, axis=1)
    return {"method": name, "accuracy": float(np.mean(picked == np.asarray(truth))), "picked": picked.tolist()}


# ---- table and figure ----------------------------------------------------------------------------------------------


def show(console: Console, rows: list[dict[str, Any]], linked: list[dict[str, Any]]) -> None:
    """The one table."""
    table = Table(title="quickstart", title_justify="left")
    for column in ("model", "perplexity", "bytes on disk", "tokens/s", "quantised in", "links, accuracy@1"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for r in rows:
        seconds = f"{r['seconds_to_quantise']} s" if r["bits"] < 32 else "–"
        table.add_row(
            r["model"], f"{r['perplexity']:.3f}", f"{r['bytes']:,}", f"{r['tokens_per_second']:,}", seconds, "–"
        )
    table.add_section()
    for r in linked:
        table.add_row(r["method"], "–", "–", "–", "–", f"{r['accuracy']:.3f}")
    console.print(table)


def draw(path: Path, history: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """The one figure: the loss curve, and perplexity against bytes on disk."""
    matplotlib = require("matplotlib.figure", "demo")
    figure = matplotlib.Figure(figsize=(9, 3.6), layout="constrained")
    curve, quality = figure.subplots(1, 2)
    for name, label in (("loss", "training"), ("eval_loss", "held-out files")):
        points = [(r["step"], r[name]) for r in history if name in r]
        curve.plot(*zip(*points, strict=True), label=label)
    curve.set(xlabel="step", ylabel="cross-entropy (nats a token)", title="pre-training")
    curve.legend()
    dense = rows[0]
    quality.axhline(dense["perplexity"], color="grey", linewidth=1, label="float32")
    for method in ("rtn", "gptq"):
        chosen = [r for r in rows if r["model"].startswith(method)]
        quality.plot([r["bits"] for r in chosen], [r["perplexity"] for r in chosen], "o-", label=method.upper())
    quality.set(xlabel="bits a weight", ylabel="perplexity on held-out files", title="quantisation")
    quality.set_xticks([r["bits"] for r in rows if r["bits"] < 32])
    quality.legend()
    figure.savefig(path, dpi=120)
