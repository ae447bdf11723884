"""Reading the oracle folders, and comparing a model with them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxformers as jf
from jaxformers import hub
from jaxformers.models.writing import to_tensors


def read(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of an oracle folder, under one vocabulary: hidden_states (n+1, …), attentions (n, …), grad.<name>."""
    file = folder / "io.npz" if (folder / "io.npz").is_file() else folder / "oracle.npz"
    with np.load(file) as z:
        arrays = {name.replace("grad/", "grad."): z[name] for name in z.files}
    for whole, part in (("hidden_states", "hidden_"), ("attentions", "attn_")):
        listed = [part + str(i) for i in range(20) if part + str(i) in arrays]
        if listed:
            arrays[whole] = np.stack([arrays[n] for n in listed])
    return arrays


def batch_of(arrays: dict[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """The model's inputs among ``arrays``."""
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids",
             "decoder_attention_mask")  # fmt: skip
    return {name: arrays[prefix + name] for name in names if prefix + name in arrays}


def forward(model: Any, batch: dict[str, Any]) -> tuple[Any, np.ndarray, np.ndarray]:
    """(Output, hidden states (n+1, B, L, D) as Hugging Face lists them, attentions (n, B, H, L, L))."""
    apply, params = jf.functional(model)
    patterns = ("embeddings", "layers.*.output", "layers.*.attention.probs")
    out, seen = jax.jit(jf.reap(apply, patterns))(params, batch)
    depth = model.config.num_hidden_layers
    hidden = [seen["embeddings"], *(seen[f"layers.{i}.output"] for i in range(depth))]
    if hasattr(model, "final_norm"):
        hidden[-1] = out.last_hidden_state  # Hugging Face lists a decoder's last state after the final norm
    return out, np.stack(hidden), np.stack([seen[f"layers.{i}.attention.probs"] for i in range(depth)])


def run(model: Any, batch: dict[str, Any]) -> Any:
    """The model's Output, compiled: op by op would take longer."""
    apply, params = jf.functional(model)
    return jax.jit(apply)(params, batch)


def grads_by_hf_name(model: Any, grads: dict[str, Any]) -> dict[str, np.ndarray]:
    """Gradients of the params as the tensors of a checkpoint: Hugging Face's names and layouts."""
    tensors, _ = to_tensors(jf.with_params(model, grads), hub.module_of(model.config))
    return {name: read() for name, _, _, read in tensors}


def assert_close(found: Any, expected: np.ndarray, tolerance: float, where: np.ndarray | None = None) -> None:
    """``max |found − expected| ≤ tolerance``, absolute, at the entries ``where`` selects on the leading axes."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    error = np.abs(found - expected)
    error = error if where is None else error[where]
    assert error.max() <= tolerance, f"max |error| {error.max():.2e} > {tolerance:.0e}"


def assert_close_scaled(found: Any, expected: np.ndarray, tolerance: float, where: np.ndarray | None = None) -> None:
    """The same, relative to the largest magnitude of ``expected`` (there)."""
    chosen = np.asarray(expected) if where is None else np.asarray(expected)[where]
    assert_close(found, expected, tolerance * float(np.abs(chosen).max()), where)
