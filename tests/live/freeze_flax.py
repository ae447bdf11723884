"""Makes tests/oracles/flax: what transformers 4's Flax classes saved and answered. Version 5 has none, so this runs in
an environment of its own: `pip install transformers==4.53.3 jax==0.4.38 jaxlib==0.4.38 flax==0.10.2`, then

    python tests/live/freeze_flax.py tests/oracles/flax
"""

import sys
from pathlib import Path

import jax
import numpy as np
import transformers as tf

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def noisy(params, seed):
    """Weights of a trained scale, biases and norms included: zeros and ones would hide what is swapped."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: (np.asarray(a) + 0.1 * rng.standard_normal(a.shape)).astype(np.float32), params)


def main(out: Path) -> None:
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(5, 90, (2, 9)).astype(np.int32), np.ones((2, 9), np.int32)
    mask[1, 6:] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    bert = tf.BertConfig(vocab_size=96, max_position_embeddings=32, **SMALL)
    gpt2 = tf.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, eos_token_id=2)
    t5 = tf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    vit = tf.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL)
    image = {"pixel_values": rng.standard_normal((2, 3, 16, 16)).astype(np.float32)}
    cases = [
        ("bert", tf.FlaxBertForMaskedLM(bert), text, {}),
        ("bert-sharded", tf.FlaxBertModel(bert), text, {"max_shard_size": "20kB"}),
        ("gpt2", tf.FlaxGPT2LMHeadModel(gpt2), text, {}),
        ("t5", tf.FlaxT5ForConditionalGeneration(t5), {**text, "decoder_input_ids": ids[:, :5]}, {}),
        ("vit", tf.FlaxViTForImageClassification(vit), image, {}),
    ]
    for seed, (name, model, batch, how) in enumerate(cases):
        model.params = noisy(model.params, seed)
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        arrays = dict(batch)
        for key in ("logits", "last_hidden_state", "pooler_output", "hidden_states", "attentions"):
            if outputs.get(key) is not None:
                value = outputs[key]
                arrays[key] = np.stack(value) if isinstance(value, tuple) else np.asarray(value)
        if name == "gpt2":
            arrays["greedy"] = np.asarray(model.generate(ids[:1], max_length=14, do_sample=False).sequences)
        model.save_pretrained(out / name, **how)
        np.savez_compressed(out / name / "io.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
