"""Writes tests/oracles/{variants,nn} from Hugging Face's own implementations: python tests/live/freeze.py

Tiny models for what the other oracles leave out: every head, and the settings that change the computation. All weights
are drawn so large that no term is invisible. Needs torch and transformers (pip install 'jaxformers[oracle]').
"""

import json
import sys
from pathlib import Path

import numpy as np

ORACLES = Path(__file__).resolve().parent.parent / "oracles"
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 24}
ROBERTA = {**ENCODER, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
OPT = {**SMALL, "ffn_dim": 24, "max_position_embeddings": 24, "word_embed_proj_dim": 16}
LLAMA = {**ENCODER, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 24}
NEOX = {**ENCODER, "rotary_pct": 0.5}
NEO = {**SMALL, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 24, "window_size": 4,
       "attention_types": [[["local", "global"], 1]]}  # fmt: skip
NEO = {k: v for k, v in NEO.items() if k not in ("num_hidden_layers", "num_attention_heads")}
GPTJ = {**GPT2, "rotary_dim": 4}
GLM = {**LLAMA, "head_dim": 8}
ELECTRA = {**ENCODER, "embedding_size": 8}
ESM = {**ENCODER, "pad_token_id": 1, "mask_token_id": 5}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
V3 = {**DEBERTA, "position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
DEEPSEEK = {
    **ENCODER, "num_key_value_heads": 2, "moe_intermediate_size": 12, "n_shared_experts": 2, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 8,
    "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2,
      "relative_attention_num_buckets": 6, "relative_attention_max_distance": 8, "decoder_start_token_id": 3,
      "pad_token_id": 0}  # fmt: skip
LABELS = {"num_labels": 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}

# name: (class, settings of its config)
VARIANTS = {
    "bert-base": ("BertModel", ENCODER),
    "bert-decoder": ("BertLMHeadModel", {**ENCODER, "is_decoder": True}),
    "roberta-decoder": ("RobertaForCausalLM", {**ROBERTA, "is_decoder": True, "tie_word_embeddings": False}),
    "bert-mlm-untied": ("BertForMaskedLM", {**ENCODER, "tie_word_embeddings": False}),
    "bert-tokens": ("BertForTokenClassification", {**ENCODER, **LABELS}),
    "roberta-base": ("RobertaModel", {**ROBERTA, "type_vocab_size": 2}),
    "roberta-mlm-untied": ("RobertaForMaskedLM", {**ROBERTA, "tie_word_embeddings": False, "hidden_act": "relu"}),
    "roberta-tokens": ("RobertaForTokenClassification", {**ROBERTA, **LABELS}),
    "camembert-mlm": ("CamembertForMaskedLM", ROBERTA),
    "distilbert-mlm": ("DistilBertForMaskedLM", {**DISTIL, "activation": "relu"}),
    "distilbert-mlm-untied": ("DistilBertForMaskedLM", {**DISTIL, "tie_word_embeddings": False}),
    "distilbert-tokens": ("DistilBertForTokenClassification", {**DISTIL, **LABELS}),
    "mpnet-mlm": ("MPNetForMaskedLM", {**ENCODER, "pad_token_id": 1, "relative_attention_num_buckets": 40}),
    "mpnet-sequence": ("MPNetForSequenceClassification", {**ENCODER, **LABELS, "pad_token_id": 1}),
    "mpnet-tokens": ("MPNetForTokenClassification", {**ENCODER, **LABELS, "pad_token_id": 1}),
    "gpt2-inverse": ("GPT2LMHeadModel", {**GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 20}),
    "gpt2-unscaled": ("GPT2LMHeadModel", {**GPT2, "scale_attn_weights": False, "tie_word_embeddings": False}),
    "gpt2-sequence": ("GPT2ForSequenceClassification", {**GPT2, **LABELS, "pad_token_id": 1}),
    "gpt2-tokens": ("GPT2ForTokenClassification", {**GPT2, **LABELS}),
    "opt-postnorm": ("OPTForCausalLM", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8}),
    "opt-bare": (
        "OPTForCausalLM",
        {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True},
    ),
    "opt-sequence": ("OPTForSequenceClassification", {**OPT, **LABELS, "word_embed_proj_dim": 8}),
    "llama-biased": ("LlamaForCausalLM", {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "llama-yarn": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": YARN}),
    "llama-sequence": ("LlamaForSequenceClassification", {**LLAMA, **LABELS}),
    "llama-tokens": ("LlamaForTokenClassification", {**LLAMA, **LABELS}),
    "bert-spans": ("BertForQuestionAnswering", ENCODER),
    "roberta-spans": ("RobertaForQuestionAnswering", ROBERTA),
    "distilbert-spans": ("DistilBertForQuestionAnswering", DISTIL),
    "mpnet-spans": ("MPNetForQuestionAnswering", {**ENCODER, "pad_token_id": 1}),
    "electra-spans": ("ElectraForQuestionAnswering", ELECTRA),
    "deberta-spans": ("DebertaV2ForQuestionAnswering", V3),
    "electra-sequence": ("ElectraForSequenceClassification", {**ELECTRA, **LABELS}),
    "electra-tokens": ("ElectraForTokenClassification", {**ELECTRA, **LABELS, "embedding_size": 16}),
    "electra-mlm-untied": ("ElectraForMaskedLM", {**ELECTRA, "tie_word_embeddings": False, "hidden_act": "relu"}),
    "esm-absolute": (
        "EsmForMaskedLM",
        {**ESM, "position_embedding_type": "absolute", "emb_layer_norm_before": True, "token_dropout": True},
    ),
    "esm-sequence": ("EsmForSequenceClassification", {**ESM, **LABELS, "position_embedding_type": "rotary"}),
    "esm-tokens": ("EsmForTokenClassification", {**ESM, **LABELS, "position_embedding_type": "rotary"}),
    "deberta-v3-mlm": ("DebertaV2ForMaskedLM", V3),
    "deberta-v2-conv": ("DebertaV2Model", {**V3, "conv_kernel_size": 3, "conv_act": "gelu", "position_buckets": 6}),
    "deberta-unshared": (
        "DebertaV2ForMaskedLM",
        {
            **DEBERTA,
            "position_biased_input": True,
            "type_vocab_size": 2,
            "embedding_size": 8,
            "max_relative_positions": 5,
            "layer_norm_eps": 1e-5,
        },
    ),
    "deberta-new-mlm": ("DebertaV2ForMaskedLM", {**V3, "legacy": False, "pos_att_type": "c2p"}),
    "deberta-sequence": ("DebertaV2ForSequenceClassification", {**V3, **LABELS, "pos_att_type": ["p2c"]}),
    "deberta-tokens": ("DebertaV2ForTokenClassification", {**ENCODER, **LABELS, "position_biased_input": True}),
    "mistral-open": ("MistralForCausalLM", {**LLAMA, "sliding_window": None, "head_dim": 6}),
    "mistral-sequence": ("MistralForSequenceClassification", {**LLAMA, **LABELS, "sliding_window": 4}),
    "qwen2-sliding": (
        "Qwen2ForCausalLM",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2-tokens": ("Qwen2ForTokenClassification", {**LLAMA, **LABELS}),
    "glm-tied": ("GlmForCausalLM", {**GLM, "tie_word_embeddings": True, "attention_bias": False}),
    "glm-sequence": ("GlmForSequenceClassification", {**GLM, **LABELS}),
    "deepseek-direct": (
        "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "max_position_embeddings": 64,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek-sequence": ("DeepseekV3ForSequenceClassification", {**DEEPSEEK, **LABELS, "rope_interleave": False}),
    "deepseek-tokens": (
        "DeepseekV3ForTokenClassification",
        {**DEEPSEEK, **LABELS, "first_k_dense_replace": 0, "num_experts_per_tok": 4, "hidden_act": "gelu"},
    ),
    "neox-serial": ("GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False, "attention_bias": False}),
    "neox-linear": ("GPTNeoXForCausalLM", {**NEOX, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "neox-sequence": ("GPTNeoXForSequenceClassification", {**NEOX, **LABELS, "pad_token_id": 0}),
    "neox-tokens": ("GPTNeoXForTokenClassification", {**NEOX, **LABELS}),
    "gptj-sequence": ("GPTJForSequenceClassification", {**GPTJ, **LABELS, "pad_token_id": 0, "n_inner": 20}),
    "neo-wide": ("GPTNeoForCausalLM", {**NEO, "intermediate_size": 20, "tie_word_embeddings": False}),
    "neo-sequence": ("GPTNeoForSequenceClassification", {**NEO, **LABELS, "pad_token_id": 0}),
    "neo-tokens": ("GPTNeoForTokenClassification", {**NEO, **LABELS}),
    "bigcode-mqa": ("GPTBigCodeForCausalLM", GPT2),
    "bigcode-mha": ("GPTBigCodeForCausalLM", {**GPT2, "multi_query": False, "scale_attn_weights": False}),
    "bigcode-sequence": ("GPTBigCodeForSequenceClassification", {**GPT2, **LABELS, "pad_token_id": 0}),
    "bigcode-tokens": ("GPTBigCodeForTokenClassification", {**GPT2, **LABELS}),
    "t5-encoder": ("T5EncoderModel", T5),
    "t5-body": ("T5Model", {**T5, "num_decoder_layers": 1, "feed_forward_proj": "gated-silu"}),
    "t5-sequence": ("T5ForSequenceClassification", {**T5, **LABELS}),
    "t5-tokens": ("T5ForTokenClassification", {**T5, **LABELS, "feed_forward_proj": "gelu"}),
    "t5-spans": ("T5ForQuestionAnswering", T5),
    "mt5": ("MT5ForConditionalGeneration", {**T5, "num_decoder_layers": 3}),
    "mt5-encoder": ("MT5EncoderModel", T5),
}


def build(name: str):
    """The Hugging Face model of a variant, in eval mode, with weights drawn from its name."""
    import torch
    import transformers

    class_name, settings = VARIANTS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(sum(name.encode()))
    model = cls._from_config(cls.config_class(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.ndim > 1
            parameter.copy_(torch.randn(parameter.shape) * (0.4 if wide else 0.2) + (0 if wide else 0.5))
        for buffer_name, buffer in model.named_buffers():
            if "correction" in buffer_name:  # of a router: as good as a weight
                buffer.copy_(torch.randn(buffer.shape) * 0.2)
    return model


def batch(name: str) -> dict[str, np.ndarray]:
    """Three rows, the second padded on the right, the third on the left."""
    rng = np.random.default_rng(sum(name.encode()))
    ids = rng.integers(4, 40, (3, 11))
    mask = np.ones_like(ids)
    mask[1, 7:] = mask[2, :3] = 0
    pad = VARIANTS[name][1].get("pad_token_id", 1 if name.startswith(("opt", "roberta", "camembert")) else 0)
    out = {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask}
    if name == "roberta-base":
        out["token_type_ids"] = rng.integers(0, 2, ids.shape)
    if name == "t5-sequence":  # one end token a row
        out["input_ids"][[0, 1, 2], [10, 6, 8]] = 1
    if name in ("t5-body", "mt5"):
        out["decoder_input_ids"] = rng.integers(4, 40, (3, 11))
        out["decoder_attention_mask"] = np.roll(mask, 1, axis=0)
    return out


def run(model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a Hugging Face model gives for ``inputs``: hidden, and pooled or logits where it has them."""
    import torch

    with torch.no_grad():
        out = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}, output_hidden_states=True)
    states = out.hidden_states if "hidden_states" in out else out.decoder_hidden_states
    found = {"hidden": states[-1].numpy()}
    if getattr(out, "pooler_output", None) is not None:
        found["pooled"] = out.pooler_output.numpy()
    if hasattr(out, "logits"):
        found["logits"] = out.logits.numpy()
    if hasattr(out, "start_logits"):
        found["logits"] = torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return found


# ---- positions -----------------------------------------------------------------------------------------------------

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "yarn-options": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 50000.0,
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0,
        "attention_factor": 0.9,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 500000.0,
    },
}  # fmt: skip
TRAINED, HEAD = 64, 16


def rope_config(kind: str) -> dict:
    """``config.json`` of a llama with that rotary embedding."""
    config = {**LLAMA, "max_position_embeddings": TRAINED, "head_dim": HEAD, "rope_parameters": ROPES[kind]}
    return {**config, "model_type": "llama", "intermediate_size": 24}


def rope(kind: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hugging Face's cosines and sines (B, L, HEAD) at ``positions`` (B, L)."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    table = LlamaRotaryEmbedding(LlamaConfig(**rope_config(kind)))
    cos, sin = table(torch.zeros(1), torch.from_numpy(positions))
    return cos.numpy(), sin.numpy()


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """x (B, L, H, HEAD) turned by Hugging Face's functions of llama, or (interleaved) of GPT-J."""
    import torch
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as turn_gptj
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_llama

    x, cos, sin = (torch.from_numpy(a) for a in (x, cos, sin))
    if interleaved:
        half = cos.shape[-1] // 2
        return turn_gptj(x, sin[..., :half], cos[..., :half]).numpy()
    return turn_llama(x, x, cos, sin, unsqueeze_dim=2)[0].numpy()


def buckets(bidirectional: bool) -> np.ndarray:
    """T5's bucket of each distance −300 … 300."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    return T5Attention._relative_position_bucket(torch.arange(-300, 301), bidirectional, 32, 128).numpy()


def positions() -> np.ndarray:
    """Two rows; they go beyond TRAINED, where ``dynamic`` starts to stretch."""
    return np.stack([np.arange(90), np.arange(90) + 7])


def main(names: list[str]) -> None:
    for name in names or VARIANTS:
        folder = ORACLES / "variants" / name
        model, inputs = build(name), batch(name)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "io.npz", **inputs, **run(model, inputs))
        print(name, sum(file.stat().st_size for file in folder.iterdir()))
    if names:
        return
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 90, 2, HEAD)).astype(np.float32)
    arrays = {"positions": positions(), "x": x[:, :12], "short": np.arange(40)[None]}
    for kind in ROPES:
        arrays[f"{kind}.cos"], arrays[f"{kind}.sin"] = rope(kind, positions())
        arrays[f"{kind}.short_cos"], arrays[f"{kind}.short_sin"] = rope(kind, arrays["short"])
        arrays[f"{kind}.config"] = np.array(json.dumps(rope_config(kind)))
    for interleaved in (False, True):
        cos, sin = (arrays[f"default.{part}"][:, :12] for part in ("cos", "sin"))
        arrays["interleaved" if interleaved else "halves"] = rotate(x[:, :12], cos, sin, interleaved)
    arrays["buckets_both"], arrays["buckets_past"] = buckets(True), buckets(False)
    (ORACLES / "nn").mkdir(exist_ok=True)
    np.savez_compressed(ORACLES / "nn" / "rotary.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
