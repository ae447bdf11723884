"""The oracle pair of Teacher Intervention as models."""

import json

import jax
import numpy as np
import parity

import jaxformers as jf
from jaxformers import hub, paths
from jaxformers.compress import teacher_intervention as ti
from jaxformers.models import bert
from jaxformers.models.keymap import lookup
from jaxformers.weights import fake_quantise, full_precision


def load(oracles):
    """(arrays, teacher, fake-quantised student, batch)"""
    z = np.load(oracles / "teacher_intervention" / "bert_pair.npz")
    sizes = json.loads(str(z["options"]))["config"]
    config = bert.Config(**sizes, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = {name: z[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    teacher, shadow = (_model(config, z, f"{who}.") for who in ("teacher", "student"))
    return z, teacher, quantised(shadow), batch


def quantised(model, config=ti.TIConfig()):
    return fake_quantise(model, ti.ternary_kernels(model), inputs=config.inputs, attention=config.attention)


def by_name(model, params):
    """Parameters (or their gradients) of a fake-quantised `model` by Hugging Face's names."""
    return parity.grads_by_hf_name(full_precision(jf.with_params(model, params)), _plain(model, params))


def _plain(model, params):
    return jf.functional(full_precision(jf.with_params(model, params)))[1]


def _model(config, arrays, prefix):
    model = jf.init(config, head="sequence_classification", key=jax.random.key(0))
    arch = hub.module_of(config)
    keys = {**{k: f"bert.{v}" for k, v in arch.KEYS.items()}, **arch.HEADS[model.head_name][1]}
    found = {}
    for path in paths.flatten(jf.functional(model)[1]):
        entry, leaf = lookup(keys, path)
        tensor = arrays[f"{prefix}{entry.name}.{leaf}"]
        found[path] = tensor.T if path.endswith("kernel") else tensor
    return jf.with_params(model, paths.unflatten(found))
