"""Direct preference optimisation (DPO, arXiv 2305.18290): learn which of two answers people liked better.

    L = -log sigmoid( beta [ (log pi(y_w | x) - log pi_ref(y_w | x)) - (log pi(y_l | x) - log pi_ref(y_l | x)) ] )

with a prompt x, the answers y_w liked and y_l not, the policy pi that is trained, and the frozen reference pi_ref, as a
rule the policy before training. log pi(y | x) sums over the tokens of the answer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers.data.padding import pad_rows
from jaxformers.functional import split_head, with_params
from jaxformers.losses import IGNORE
from jaxformers.mesh import constrained
from jaxformers.token_losses import dpo_loss, token_terms
from jaxformers.train.config import TrainConfig
from jaxformers.train.distil import Trained, check_vocabulary, within
from jaxformers.train.loop import Objective, fit

SIDES = ("chosen", "rejected")


def preference_rows(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    *,
    pad_id: int = 0,
    max_prompt: int = 512,
    max_length: int = 1024,
) -> dict[str, np.ndarray]:
    """Token ids as rows for `dpo_objective`, padded on the right to one length, at most ``max_length``.

    -> for each side of ``chosen``, ``rejected``: ``<side>.input_ids``, ``<side>.attention_mask`` and ``<side>.labels``
    (n, L) int32, the labels being each position's next token where that is part of the answer, else -100. A prompt
    keeps its last ``max_prompt`` tokens, an answer the first of its tokens that then fit. Batches are made of the rows
    by :func:`jaxformers.data.batches.array_batches`.

    Raises ValueError: lists of unequal length or none, an empty prompt or answer, limits that leave no answer.
    """
    if not len(prompts) == len(chosen) == len(rejected) or not len(prompts):
        raise ValueError(
            f"prompts, chosen, rejected: expected as many of each, got {len(prompts)}, {len(chosen)}, {len(rejected)}"
        )
    if not 1 <= max_prompt < max_length:
        raise ValueError(
            f"max_prompt, max_length: expected 1 <= max_prompt < max_length, got {max_prompt}, {max_length}"
        )
    for name, listed in (("prompts", prompts), ("chosen", chosen), ("rejected", rejected)):
        for i, ids in enumerate(listed):
            if not len(ids):
                raise ValueError(f"{name}: number {i} is empty")
    rows: dict[str, list[list[int]]] = {}
    for side, answers in zip(SIDES, (chosen, rejected), strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            start = [int(i) for i in prompt][-max_prompt:]
            ids = (start + [int(i) for i in answer])[:max_length]
            rows.setdefault(f"{side}.input_ids", []).append(ids)
            rows.setdefault(f"{side}.attention_mask", []).append([1] * len(ids))
            rows.setdefault(f"{side}.labels", []).append([IGNORE] * (len(start) - 1) + ids[len(start) :] + [IGNORE])
    length = max(len(ids) for side in SIDES for ids in rows[f"{side}.input_ids"])
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE}
    return {name: pad_rows(listed, length, fill[name.partition(".")[2]], "right") for name, listed in rows.items()}


def dpo_objective(
    policy: nnx.Module,
    reference: nnx.Module,
    *,
    beta: float = 0.1,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **options: Any,
) -> tuple[Objective, dict[str, Any], tuple[str, ...]]:
    """``(objective, params, freeze)`` for `jaxformers.train.fit`: L of the module's first paragraph, mean over pairs.

    ``params`` is {"policy": …, "reference": …}; the reference is run without dropout, gradient or update. Batches are
    those of `preference_rows`. Both answers of a batch are run as one. ``chunk``: positions whose logits exist at a
    time (:func:`jaxformers.token_losses.token_terms`). Metrics: ``accuracy``, the share of pairs whose order the
    rewards have right; ``margin``, the mean difference of the rewards beta log(pi / pi_ref). ``mesh``: the one that
    `fit` is going to be given. ``options`` (scan_layers, remat) go to the policy.

    Raises ValueError: a model without a causal language model's head, vocabularies that differ, a beta of 0 or less.
    """
    if not beta > 0:
        raise ValueError(f"beta: must be > 0, got {beta}")
    for name, model in (("policy", policy), ("reference", reference)):
        if model.head_name != "causal_lm":
            raise ValueError(f"{name}: expected a causal_lm head, got {model.head_name or 'none'}")
    check_vocabulary(reference, policy)
    body, head, params = split_head(policy, **options)
    reference_body, reference_head, reference_params = split_head(reference)
    if mesh is not None:
        body, reference_body = constrained(body, mesh), constrained(reference_body, mesh)

    def objective(apply: Any, params: dict[str, Any], batch: Mapping[str, jax.Array], key: jax.Array | None):
        whole = {name: _both(batch, name) for name in ("input_ids", "attention_mask", "labels")}
        ours = _log_probs(body, head, params["policy"], whole, key, chunk)
        theirs = _log_probs(
            reference_body, reference_head, jax.lax.stop_gradient(params["reference"]), whole, None, chunk
        )
        (won, lost), (reference_won, reference_lost) = jnp.split(ours, 2), jnp.split(theirs, 2)
        margin = jax.lax.stop_gradient(beta * (won - lost - (reference_won - reference_lost)))
        loss = jnp.mean(dpo_loss(won, lost, reference_won, reference_lost, beta=beta))
        return loss, {"accuracy": jnp.mean(margin > 0), "margin": jnp.mean(margin)}

    return objective, {"policy": params, "reference": reference_params}, ("reference.**",)


def _both(batch: Mapping[str, jax.Array], name: str) -> Int[Array, "pairs_twice length"]:
    missing = [f"{side}.{name}" for side in SIDES if f"{side}.{name}" not in batch]
    if missing:
        raise ValueError(f"batch: it has no {missing[0]}; make it by preference_rows")
    return jnp.concatenate([batch[f"{side}.{name}"] for side in SIDES])


def _log_probs(
    body: Callable, head: Callable, params: Any, rows: dict[str, jax.Array], key: jax.Array | None, chunk: int | None
) -> Float[Array, "rows"]:
    """log pi(y | x) of each row, in nats."""
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    hidden = body(params, inputs, rngs=key).last_hidden_state
    terms = token_terms(hidden, lambda h: head(params, h), labels=rows["labels"], chunk=chunk)
    return -jnp.sum(terms["nll"], axis=1)


def dpo(
    policy: nnx.Module,
    data: Iterable,
    config: TrainConfig,
    *,
    key: jax.Array,
    reference: nnx.Module | None = None,
    beta: float = 0.1,
    chunk: int | None = None,
    eval_data: Iterable | None = None,
    directory: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Trained:
    """Train ``policy`` on pairs of answers (batches of `preference_rows`); ``reference`` None is the policy as given.

    ``config``'s path patterns, scan_layers and remat are the policy's. ``directory``: as for `fit`; a run found there
    is taken up again. Returns the trained policy; the models given stay untouched. Raises ValueError as
    `dpo_objective` and `fit` do.
    """
    reference = policy if reference is None else reference
    options = {"scan_layers": config.scan_layers, "remat": config.remat, "mesh": mesh}
    objective, params, freeze = dpo_objective(policy, reference, beta=beta, chunk=chunk, **options)
    result = fit(
        objective, params, data, within(config, "policy", freeze), key=key, eval_data=eval_data, directory=directory,
        mesh=mesh,
    )  # fmt: skip
    return Trained(with_params(policy, result.params["policy"]), result.history)
