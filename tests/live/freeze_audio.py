"""Writes tests/oracles/variants/wav2vec2-* from Hugging Face's own implementation: python tests/live/freeze_audio.py

Tiny models of every head and both layouts, weights nowhere zero; what they give for waveforms without and with padding.
"""

from pathlib import Path

import numpy as np

ORACLES = Path(__file__).resolve().parent.parent / "oracles"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
AST = {**SIZES, "max_length": 40, "num_mel_bins": 20, "patch_size": 8, "frequency_stride": 6, "time_stride": 4}
WAVE = {
    **SIZES, "conv_dim": (6, 7, 8), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2), "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 5, "num_labels": 3, "mask_time_length": 2,
    "vocab_size": 11,
}  # fmt: skip
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, "num_conv_pos_embeddings": 7}

# name: (class, settings of its config); those called wav2vec2 are frozen
MODELS = {
    "ast": ("ASTModel", {**AST, "qkv_bias": False}),
    "ast-audio": (
        "ASTForAudioClassification",
        {**AST, "hidden_act": "relu", "num_labels": 3, "layer_norm_eps": 1e-5},
    ),
    "wav2vec2": ("Wav2Vec2Model", WAVE),
    "wav2vec2-unmasked": ("Wav2Vec2Model", {**WAVE, **LAYER, "mask_time_prob": 0.0}),
    "wav2vec2-ctc": ("Wav2Vec2ForCTC", {**WAVE, "hidden_act": "relu"}),
    "wav2vec2-ctc-stable": ("Wav2Vec2ForCTC", {**WAVE, **LAYER}),
    "wav2vec2-sequence": ("Wav2Vec2ForSequenceClassification", {**WAVE, "use_weighted_layer_sum": True}),
    "wav2vec2-sequence-stable": ("Wav2Vec2ForSequenceClassification", {**WAVE, **LAYER}),
    "wav2vec2-frames": (
        "Wav2Vec2ForAudioFrameClassification",
        {**WAVE, **LAYER, "use_weighted_layer_sum": True},
    ),
}
LABELS = np.array([[3, 4, 4, 5, 10], [7, 8, -100, -100, -100]])
GRADIENTS = (
    "feature_extractor.conv_layers.0.conv.weight", "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1", "encoder.layers.0.attention.k_proj.weight",
)  # fmt: skip


def build(name: str):
    """The Hugging Face model, in eval mode, with weights drawn from its name."""
    import torch
    import transformers

    class_name, settings = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(sum(name.encode()))
    model = cls._from_config(cls.config_class(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (0.5 if parameter.ndim == 1 else 0))
    return model


def inputs(name: str) -> list[dict[str, np.ndarray]]:
    """Batches: a spectrogram; or waveforms without padding, and with."""
    rng = np.random.default_rng(0)
    if name.startswith("ast"):
        return [{"input_values": rng.standard_normal((2, 40, 20)).astype(np.float32)}]
    wave = rng.standard_normal((2, 400)).astype(np.float32)
    mask = (np.arange(400) < np.array([[400], [271]])).astype(np.int64)
    return [{"input_values": wave}, {"input_values": wave * mask.astype(np.float32), "attention_mask": mask}]


def run(model, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """last_hidden_state, pooled and logits, those that the model has."""
    import torch

    with torch.no_grad():
        out = model(**{name: torch.from_numpy(value) for name, value in batch.items()}, output_hidden_states=True)
    names = {"last_hidden_state": "last_hidden_state", "pooler_output": "pooled", "logits": "logits"}
    return {ours: out[theirs].numpy() for theirs, ours in names.items() if out.get(theirs) is not None}


def ctc(model, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The summed CTC loss for LABELS, and some of its gradients."""
    import torch

    model.zero_grad()
    loss = model(**{k: torch.from_numpy(v) for k, v in batch.items()}, labels=torch.from_numpy(LABELS)).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.wav2vec2.named_parameters()}
    found = {f"grad.wav2vec2.{name}": grads[name].numpy() for name in GRADIENTS}
    return {"loss": loss.detach().numpy(), **found}


def main() -> None:
    for name in MODELS:
        if not name.startswith("wav2vec2"):
            continue
        folder = ORACLES / "variants" / name
        model = build(name)
        model.save_pretrained(folder)
        arrays = {}
        for kind, batch in zip(("plain", "padded"), inputs(name), strict=True):
            found = run(model, batch) | (ctc(model, batch) if "ctc" in name else {})
            arrays |= {f"{kind}.{part}": value for part, value in {**batch, **found}.items()}
        np.savez_compressed(folder / "io.npz", **arrays)
        print(name, sum(file.stat().st_size for file in folder.iterdir()))


if __name__ == "__main__":
    main()
