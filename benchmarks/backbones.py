"""One mid-sized model of each family, forward, one AdamW step and greedy decoding: this library against Hugging Face.

    python benchmarks/backbones.py [--families bert llama t5 …] [--rounds 5] [--one-core] [--out FILE.md]

Both get the same random weights and the same batch, in float32, without dropout, on the same CPU, in turns. They must
agree on the outputs, on the loss before and after three steps, and on the tokens. Ours is one jitted function with
donated arguments; theirs is what their users run: `model(**batch)`, `loss.backward()`, `optimizer.step()`, `generate`.
The loss is a cross-entropy over the logits, written once for each side. Compile times stand apart.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers as tf
from compare import HEADER, alternate, arguments, report, row

import jaxformers as jf
from jaxformers.losses import cross_entropy

TEXT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NEW_TOKENS = 32
RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """``build`` the Hugging Face model, ``batch`` its inputs, ``labels`` for its logits; ``decode``: inputs of
    ``generate``, None where it does not generate."""

    what: str
    build: Callable[[], Any]
    batch: dict[str, np.ndarray]
    labels: np.ndarray
    decode: dict[str, np.ndarray] | None = None


def ids(*shape: int, high: int = 30000) -> np.ndarray:
    return RNG.integers(1000, high, shape)


def masked(batch: int, length: int) -> dict[str, np.ndarray]:
    mask = np.ones((batch, length), np.int64)
    mask[: batch // 2, -length // 8 :] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def pixels(batch: int, size: int) -> np.ndarray:
    return RNG.standard_normal((batch, 3, size, size)).astype(np.float32)


def bert() -> Case:
    batch = masked(8, 128)
    chosen = (RNG.random((8, 128)) < 0.15) & (batch["attention_mask"] == 1)
    labels = np.where(chosen, batch["input_ids"], -100)
    return Case("BERT-base, masked LM, 8 × 128", lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT)), batch, labels)


def llama() -> Case:
    config = tf.LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.06, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    batch = {"input_ids": ids(4, 128)}
    labels = np.concatenate([batch["input_ids"][:, 1:], np.full((4, 1), -100)], axis=1)
    prompt = {"input_ids": ids(4, 32)}
    return Case("llama, 8 × 768, 4 × 128", lambda: tf.LlamaForCausalLM(config), batch, labels, prompt)


def t5() -> Case:
    config = tf.T5Config(vocab_size=32128, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=None)  # t5-small
    batch = {**masked(8, 128), "decoder_input_ids": ids(8, 32)}
    return Case("T5-small, 8 × (128 + 32)", lambda: tf.T5ForConditionalGeneration(config), batch, ids(8, 32),
                masked(4, 64))  # fmt: skip


def vit() -> Case:
    config = tf.ViTConfig(num_labels=100, **TEXT)
    return Case("ViT-B/16, 4 × 224²", lambda: tf.ViTForImageClassification(config), {"pixel_values": pixels(4, 224)},
                RNG.integers(0, 100, 4))  # fmt: skip


def swin() -> Case:
    config = tf.SwinConfig(num_labels=100, drop_path_rate=0.0)
    return Case("Swin-T, 4 × 224²", lambda: tf.SwinForImageClassification(config), {"pixel_values": pixels(4, 224)},
                RNG.integers(0, 100, 4))  # fmt: skip


def segformer() -> Case:
    config = tf.SegformerConfig(num_labels=19, classifier_dropout_prob=0.0, drop_path_rate=0.0)  # b0
    return Case("SegFormer-B0, 2 × 256²", lambda: tf.SegformerForSemanticSegmentation(config),
                {"pixel_values": pixels(2, 256)}, RNG.integers(0, 19, (2, 64, 64)))  # fmt: skip


def ast() -> Case:
    config = tf.ASTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
                          max_length=512, num_labels=35, **TEXT)  # fmt: skip
    frames = RNG.standard_normal((2, 512, 128)).astype(np.float32)
    return Case("AST, 6 × 384, 2 × 512 frames", lambda: tf.ASTForAudioClassification(config),
                {"input_values": frames}, RNG.integers(0, 35, 2))  # fmt: skip


def llava() -> Case:
    vision = tf.CLIPVisionConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
                                 image_size=224, patch_size=16)  # fmt: skip
    text = tf.LlamaConfig(
        vocab_size=32064, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=1024, initializer_range=0.06, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000, image_seq_length=196)
    tokens = np.concatenate([np.full((2, 196), 32000), ids(2, 28)], axis=1)
    batch = {"input_ids": tokens, "pixel_values": pixels(2, 224)}
    labels = np.concatenate([np.full((2, 196), -100), tokens[:, 197:], np.full((2, 1), -100)], axis=1)
    return Case("LLaVA, 6 × 384 + 6 × 512, 2 × (196 + 28)", lambda: tf.LlavaForConditionalGeneration(config), batch,
                labels, batch)  # fmt: skip


FAMILIES = {case.__name__: case for case in (bert, llama, t5, vit, swin, segformer, ast, llava)}


def loss_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if logits.ndim == 4:  # (B, classes, rows, columns)
        logits = jnp.moveaxis(logits, 1, -1)
    return cross_entropy(logits, labels)


def torch_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits if logits.ndim == 4 else logits.reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(logits, labels if logits.ndim == 4 else labels.reshape(-1))


def measure(case: Case, rounds: int) -> tuple[list[str], str]:
    """The table's rows of one family and a note on its compile times."""
    torch.manual_seed(0)
    theirs = case.build().eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        model = jf.load(directory)
    apply, params = jf.functional(model)
    batch, labels = jax.tree.map(jnp.asarray, case.batch), jnp.asarray(case.labels)
    torch_batch = {name: torch.from_numpy(value) for name, value in case.batch.items()}
    torch_labels = torch.from_numpy(case.labels)
    rows, notes = [], []

    start = time.perf_counter()
    forward = jax.jit(lambda params, batch: apply(params, batch).logits).lower(params, batch).compile()
    notes.append(f"forward {time.perf_counter() - start:.1f} s")
    ours_forward = lambda: forward(params, batch).block_until_ready()

    def theirs_forward() -> torch.Tensor:
        with torch.inference_mode():
            return theirs(**torch_batch).logits

    real = np.asarray(ours_forward()), theirs_forward().numpy()
    difference = np.abs(real[0] - real[1])
    if "attention_mask" in case.batch and real[0].shape[:2] == case.batch["attention_mask"].shape:
        difference = difference[case.batch["attention_mask"] == 1]
    assert difference.max() < 5e-5 * np.abs(real[1]).max(), difference.max()
    rows.append(row(f"{case.what}: forward, ms", *alternate(ours_forward, theirs_forward, rounds), per=1e3))

    if case.decode is not None:
        ours_decode, theirs_decode = decoders(case, model, theirs)
        start = time.perf_counter()
        a = ours_decode()
        first = time.perf_counter() - start
        b = theirs_decode()
        assert np.array_equal(a, b), f"{(a != b).sum()} of {a.size} tokens differ"
        times = alternate(ours_decode, theirs_decode, rounds)
        notes.append(f"decoding {first - min(times[0]):.1f} s")
        decode_row = row(f"{case.what}: {NEW_TOKENS} tokens greedily, ms per token", *times, per=1e3 / NEW_TOKENS)

    optimizer = optax.adamw(1e-4, weight_decay=0.01)

    def step(params: dict, state: tuple, batch: dict, labels: jax.Array) -> tuple:
        loss, gradient = jax.value_and_grad(lambda p: loss_of(apply(p, batch).logits, labels))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    run = {"params": jax.tree.map(jnp.array, params)}
    run["state"] = optimizer.init(run["params"])
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(run["params"], run["state"], batch, labels).compile()
    notes.append(f"step {time.perf_counter() - start:.1f} s")

    def ours_step() -> float:
        run["params"], run["state"], loss = compiled(run["params"], run["state"], batch, labels)
        return float(loss)

    # in eval mode: no dropout anywhere, and batch norms use their running statistics on both sides
    torch_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.01)

    def theirs_step() -> float:
        loss = torch_loss(theirs(**torch_batch).logits, torch_labels)
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        return loss.item()

    for _ in range(3):
        a, b = ours_step(), theirs_step()
        assert abs(a - b) < 5e-4 * abs(b), (a, b)
    rows.append(row(f"{case.what}: train step, ms", *alternate(ours_step, theirs_step, rounds), per=1e3))
    return rows + ([decode_row] if case.decode is not None else []), f"{case.what}: {', '.join(notes)}"


def decoders(case: Case, model: Any, theirs: Any) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Greedy continuation by `NEW_TOKENS` tokens, new tokens only, by each side."""
    prompt = {name: torch.from_numpy(value) for name, value in case.decode.items()}
    if "attention_mask" not in prompt:
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    skip = 1 if theirs.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    masks = prompt["attention_mask"].numpy() == 1
    rows = [tokens[mask] for tokens, mask in zip(case.decode["input_ids"], masks, strict=True)]
    extra = {name: value for name, value in case.decode.items() if name == "pixel_values"}

    def ours() -> np.ndarray:
        return np.asarray(jf.generate(model, rows, max_new_tokens=NEW_TOKENS, eos_token_id=(), **extra))

    def their() -> np.ndarray:
        new = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            return theirs.generate(**prompt, **new)[:, skip:].numpy()

    return ours, their


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    args = arguments(parser)
    table, notes = [HEADER], []
    for name in args.families:
        rows, note = measure(FAMILIES[name](), args.rounds)
        table, notes = table + rows, [*notes, note]
        print(*rows, note, sep="\n", flush=True)
    report(
        args.out,
        "Backbones: forward, train step and cached decoding, float32",
        table,
        f"Compile times, once and not in the table. {'; '.join(notes)}. Outputs, losses and tokens of both agreed.",
    )


if __name__ == "__main__":
    main()
