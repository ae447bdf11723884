"""A model of BERT-base's size, forward and one AdamW step: this library against Hugging Face on the same CPU.

    python benchmarks/backbones.py [--rounds 7] [--batch 8] [--length 128] [--layers 12] [--one-core] [--out FILE.md]

Both get the same random weights and the same masked language modelling batch, in float32, without dropout, and must
agree on the loss before and after the steps. Ours is one jitted function with donated arguments; theirs is what their
users run: `model(**batch)`, `loss.backward()`, `optimizer.step()`. Compile time is reported apart.
"""

import argparse
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from compare import HEADER, alternate, arguments, report, row

import jaxformers as jf
from jaxformers.losses import cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 7), ("batch", 8), ("length", 128), ("layers", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = arguments(parser)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=args.layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    theirs = transformers.BertForMaskedLM(config)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        apply, params = jf.functional(jf.load(directory))
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, config.vocab_size, (args.batch, args.length))
    mask = np.ones_like(ids)
    mask[: args.batch // 2, -args.length // 8 :] = 0
    labels = np.where((rng.random(ids.shape) < 0.15) & (mask == 1), ids, -100)
    batch = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}
    torch_batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    targets, torch_targets = jnp.asarray(labels), torch.tensor(labels)
    table, notes = [HEADER], []

    # ---- forward -----------------------------------------------------------------------------------------------
    body = theirs.bert.eval()
    start = time.perf_counter()
    hidden = jax.jit(lambda params, batch: apply(params, batch).last_hidden_state).lower(params, batch).compile()
    notes.append(f"forward {time.perf_counter() - start:.1f} s")
    ours_forward = lambda: hidden(params, batch).block_until_ready()

    def theirs_forward() -> torch.Tensor:
        with torch.inference_mode():
            return body(**torch_batch).last_hidden_state

    difference = np.abs(np.asarray(ours_forward()) - theirs_forward().numpy())[mask == 1].max()
    assert difference < 2e-5 * np.abs(ours_forward()).max(), difference
    table.append(row("forward, ms", *alternate(ours_forward, theirs_forward, args.rounds), per=1e3))

    # ---- train step --------------------------------------------------------------------------------------------
    optimizer = optax.adamw(1e-4, weight_decay=0.01)

    def loss_of(params: dict, batch: dict, targets: jax.Array) -> jax.Array:
        return cross_entropy(apply(params, batch).logits, targets)

    def step(params: dict, state: tuple, batch: dict, targets: jax.Array) -> tuple:
        loss, gradient = jax.value_and_grad(loss_of)(params, batch, targets)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.array, params)
    state = optimizer.init(params)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch, targets).compile()
    notes.append(f"train step {time.perf_counter() - start:.1f} s")
    run = {"params": params, "state": state}

    def ours_step() -> float:
        run["params"], run["state"], loss = compiled(run["params"], run["state"], batch, targets)
        return float(loss)

    theirs.train()
    torch_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.01)

    def theirs_step() -> float:
        loss = theirs(**torch_batch, labels=torch_targets).loss
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        return loss.item()

    for _ in range(3):
        a, b = ours_step(), theirs_step()
        assert abs(a - b) < 2e-4 * abs(b), (a, b)
    table.append(row("train step, ms", *alternate(ours_step, theirs_step, args.rounds), per=1e3))
    report(
        args.out,
        f"BERT-base forward and train step, {args.batch} × {args.length}, {args.layers} layers, float32",
        table,
        f"Compile time, once and not in the table: {', '.join(notes)}. The masked language model's head is part of the "
        f"step, not of the forward pass. Outputs and losses of both agreed while this ran.",
    )


if __name__ == "__main__":
    main()
