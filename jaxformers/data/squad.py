"""SQuAD 1.1 (arXiv 1606.05250) and 2.0 (arXiv 1806.03822): questions about a text, answered by a span of it.

    questions = read_squad("dev-v1.1.json")
    windows = squad_windows(tokenizer, questions, length=384, stride=128)
    logits = apply(params, windows.inputs).logits                         # (n, L, 2), in batches
    found = best_spans(windows, questions, logits)
    squad_scores(chosen_answers(found), questions)                        # {"exact_match": ..., "f1": ...}

A text longer than the model's input is cut into windows that overlap. Training rows carry the answer's first and last
token, of the first token ([CLS]) where the window does not hold the answer or there is none. Windows and decoding are
those of BERT (arXiv 1810.04805, section 4.2 and its published code), scores those of SQuAD's evaluation.
"""

import collections
import copy
import dataclasses
import itertools
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxformers.data.padding import pad_rows
from jaxformers.data.text import read_text
from jaxformers.data.tokenizers import Tokenizer

WHERE = "download train-v1.1.json and dev-v1.1.json (or v2.0) from rajpurkar.github.io/SQuAD-explorer"


@dataclasses.dataclass(frozen=True)
class Question:
    """``answers``: (text, where it begins in the context, in characters); none where the question has no answer."""

    id: str
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Windows:
    """``inputs``: "input_ids", "attention_mask", "token_type_ids". ``targets``: "start_positions", "end_positions".
    ``question``: the number of each window's question. ``offsets``: characters of the context that a token stands for,
    -1 for tokens of anything else. ``central``: is this the window that sees most on both sides of the token?"""

    inputs: dict[str, Int[np.ndarray, "n length"]]
    targets: dict[str, Int[np.ndarray, "n"]]
    question: Int[np.ndarray, "n"]
    offsets: Int[np.ndarray, "n length 2"]
    central: Bool[np.ndarray, "n length"]


@dataclasses.dataclass(frozen=True)
class Span:
    """A text ("" is no answer) and the sum of its first and last token's logits."""

    text: str
    score: float


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_squad(path: str | PathLike, rows: int | None = None) -> list[Question]:
    """The questions of a SQuAD file (.json, or with .gz), the first ``rows`` at most.

    Raises ValueError naming the file: missing, not JSON, another layout, no questions, or an answer that its context
    does not hold where it says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data: {path} is no file; {WHERE}")
    try:
        data = json.loads(read_text(path))
        questions = list(itertools.islice(_questions(data), rows))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not SQuAD's layout, data[].paragraphs[].qas[] ({error!r})") from None
    if not questions:
        raise ValueError(f"{path}: no questions")
    for q in questions:
        for text, start in q.answers:
            if start < 0 or not q.context.startswith(text, start):
                raise ValueError(f"{path}: question {q.id}: its context does not hold {text!r} at character {start}")
    return questions


def _questions(data: Mapping[str, Any]) -> Iterator[Question]:
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                given = [] if qa.get("is_impossible") else qa["answers"]
                answers = tuple((str(a["text"]), int(a["answer_start"])) for a in given)
                yield Question(str(qa["id"]), str(qa["question"]).strip(), str(paragraph["context"]), answers)


# ---- windows ---------------------------------------------------------------------------------------------------------


def squad_windows(
    tokenizer: Tokenizer, questions: Sequence[Question], *, length: int = 384, stride: int = 128,
    question_length: int = 64,
) -> Windows:  # fmt: skip
    """Rows of ``length`` tokens, padded on the right: [CLS] question [SEP] part of the context [SEP].

    The parts of one context begin ``stride`` tokens apart (BERT's doc_stride; Hugging Face's tokenizers call what two
    parts share the stride). Questions are cut after ``question_length`` tokens. Targets are those of the first answer.

    Raises ValueError: no questions, a tokenizer without [CLS] in front, a stride below 1, a length without room.
    """
    if not questions:
        raise ValueError("questions: there are none")
    if stride < 1 or question_length < 1:
        raise ValueError(f"stride, question_length: expected 1 or more, got {stride}, {question_length}")
    core = copy.deepcopy(tokenizer.core)  # which keeps truncation: other threads use the tokenizer's own
    frame = core.num_special_tokens_to_add(True)
    encoded, owner, places, central, targets = [], [], [], [], []
    for number, q in enumerate(questions):
        core.no_truncation()
        own = core.encode(q.text, add_special_tokens=False)
        text = q.text if len(own) <= question_length else q.text[: own.offsets[question_length - 1][1]]
        room = length - frame - min(len(own), question_length)
        if room < 1:
            raise ValueError(f"length={length}: no room beside {length - room} tokens of question {q.id} and its frame")
        core.enable_truncation(length, stride=max(room - stride, 0), strategy="only_second", direction="right")
        whole = core.encode(text, q.context)
        parts = [whole, *whole.overflowing]
        spans = [_context(part) for part in parts]
        step = min(stride, room)
        central += _central([i * step for i in range(len(parts))], [int((s[:, 0] >= 0).sum()) for s in spans])
        targets += [_target(s, q, i == 0, i == len(parts) - 1) for i, s in enumerate(spans)]
        encoded, owner, places = encoded + parts, owner + [number] * len(parts), places + spans
    if tokenizer.cls_id is None or any(part.ids[0] != tokenizer.cls_id for part in encoded):
        raise ValueError("tokenizer: spans need one that puts [CLS] (or <s>) first, which stands for no answer")
    inputs = {
        "input_ids": pad_rows([e.ids for e in encoded], length, tokenizer.pad_id, "right"),
        "attention_mask": pad_rows([e.attention_mask for e in encoded], length, 0, "right"),
        "token_type_ids": pad_rows([e.type_ids for e in encoded], length, 0, "right"),
    }
    ends = np.asarray(targets, np.int32)
    offsets = np.stack([pad_rows([p[:, k] for p in places], length, -1, "right") for k in (0, 1)], -1)
    most = np.zeros(offsets.shape[:2], bool)
    most[offsets[..., 0] >= 0] = np.concatenate(central)
    return Windows(
        inputs, {"start_positions": ends[:, 0], "end_positions": ends[:, 1]}, np.asarray(owner, np.int32), offsets, most
    )


def _context(part: Any) -> np.ndarray:
    """(tokens, 2): characters of the context, -1 for other tokens."""
    inside = np.asarray([s == 1 for s in part.sequence_ids])
    return np.where(inside[:, None], np.asarray(part.offsets, np.int32), -1)


def _central(starts: list[int], counts: list[int]) -> list[np.ndarray]:
    """For each part of a context its tokens whose smaller side is largest there: min(left, right) + 0.01 tokens of the
    part, the first among equals."""
    total = starts[-1] + counts[-1]
    scores = np.full((len(starts), total), -1.0)
    for row, start, count in zip(scores, starts, counts, strict=True):
        left = np.arange(count)
        row[start : start + count] = np.minimum(left, count - 1 - left) + 0.01 * count
    best = scores.argmax(0) if total else np.zeros(0, int)
    return [best[a : a + n] == i for i, (a, n) in enumerate(zip(starts, counts, strict=True))]


def _target(spans: np.ndarray, question: Question, first: bool, last: bool) -> tuple[int, int]:
    """The answer's first and last token in a window; (0, 0), [CLS], where it is not all there."""
    where = np.flatnonzero(spans[:, 0] >= 0)
    if not question.answers or not len(where):
        return 0, 0
    text, begin = question.answers[0]
    end = begin + len(text)
    starts, ends = spans[where, 0], spans[where, 1]
    if (begin < starts[0] and not first) or (end > ends[-1] and not last):
        return 0, 0
    inside = where[(ends > begin) & (starts < end)]
    return (int(inside[0]), int(inside[-1])) if len(inside) else (0, 0)


# ---- answers ---------------------------------------------------------------------------------------------------------


def best_spans(
    windows: Windows, questions: Sequence[Question], logits: Any, *, n_best: int = 20, max_tokens: int = 30
) -> dict[str, list[Span]]:
    """{question's id: its best spans, best first, each text once; the last is "", no answer}.

    logits: (n, L, 2) of the first and the last token. Spans have ``max_tokens`` at most, begin in the window that sees
    most around their first token, and join the ``n_best`` best beginnings and ends of a window. No answer scores what
    [CLS] does in the window where that is least. Raises ValueError for logits of another shape.
    """
    logits = np.asarray(logits, np.float64)
    if logits.shape != (*windows.central.shape, 2):
        raise ValueError(f"logits: expected {(*windows.central.shape, 2)}, got {logits.shape}")
    spans: list[dict[str, float]] = [{} for _ in questions]
    null = np.full(len(questions), np.inf)
    for number, places, central, scores in zip(
        windows.question, windows.offsets, windows.central, logits, strict=True
    ):  # fmt: skip
        null[number] = min(null[number], scores[0].sum())
        begins, ends = (np.argsort(-scores[:, k], kind="stable")[:n_best] for k in (0, 1))
        context = questions[number].context
        for i in begins[(places[begins, 0] >= 0) & central[begins]]:
            for j in ends[(places[ends, 0] >= 0) & (ends >= i) & (ends < i + max_tokens)]:
                text, score = context[places[i, 0] : places[j, 1]], scores[i, 0] + scores[j, 1]
                spans[number][text] = max(score, spans[number].get(text, -np.inf))
    found = {}
    for q, own, nothing in zip(questions, spans, null, strict=True):
        ranked = sorted(((t, s) for t, s in own.items() if t), key=lambda pair: -pair[1])[:n_best]
        found[q.id] = [*(Span(text, float(score)) for text, score in ranked), Span("", float(nothing))]
    return found


def chosen_answers(found: Mapping[str, Sequence[Span]], null_threshold: float | None = None) -> dict[str, str]:
    """{id: text} of what :func:`best_spans` has found: the best span, and "" only where there is none (SQuAD 1.1).

    With a ``null_threshold`` (SQuAD 2.0; 0 to begin with) also where no answer scores higher by more than that.
    """
    chosen = {}
    for name, (best, *others) in found.items():
        nothing = others[-1].score if others else best.score
        chosen[name] = "" if null_threshold is not None and nothing - best.score > null_threshold else best.text
    return chosen


def squad_scores(answers: Mapping[str, str], questions: Sequence[Question]) -> dict[str, float]:
    """{"exact_match", "f1"} in 0..1, means over questions, each against the answer of its own that fits best.

    As SQuAD 2.0's evaluation: compared without case, punctuation and articles; F1 is of words; where one side is empty
    both scores say whether both are. Where some questions have no answer also "f1_answerable" and "f1_unanswerable".
    SQuAD 1.1's evaluation differs only for answers that are nothing but articles or punctuation, whose F1 it calls 0.

    Raises ValueError where a question has no answer in ``answers``.
    """
    missing = [q.id for q in questions if q.id not in answers]
    if missing or not questions:
        raise ValueError(f"answers: none for question {missing[0]}" if missing else "questions: there are none")
    rows = []
    for q in questions:
        golds = [normal for text, _ in q.answers if (normal := normal_answer(text))] or [""]
        said = normal_answer(answers[q.id])
        rows.append((max(float(said == gold) for gold in golds), max(_f1(said, gold) for gold in golds)))
    exact, f1 = np.asarray(rows).T
    real = np.asarray([bool(q.answers) for q in questions])
    scores = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    if real.any() and not real.all():
        scores |= {"f1_answerable": float(f1[real].mean()), "f1_unanswerable": float(f1[~real].mean())}
    return scores


def normal_answer(text: str) -> str:
    """What SQuAD's evaluation compares: lower case, without punctuation and the words a, an, the, one blank between."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(said: str, gold: str) -> float:
    a, b = said.split(), gold.split()
    if not a or not b:
        return float(a == b)
    shared = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * shared / (len(a) + len(b))
