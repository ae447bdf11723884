"""FuseGPT: remove whole layers of a decoder and graft their weights into the neighbours through learned coefficients.

Source: "FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers" ("From Pruning to Grafting" since
version 3), arXiv 2411.14507. Every round looks at the network as it is by then:

1. the victim f is the layer of the least macro influence MI_f                                           (depth.py);
2. its group are the G layers around it, f included; u is what the first of them is given, y what the last puts out;
3. f is removed, and every linear map W of every other layer of the group gets the victim's W_f of the same name:

       W_eff = W + A B + Σ_k (D_k C_k) ⊙ W_f^(k)                        (weights/grafted.py; kernels are (in, out))

   over all victims k so far, with B = 0 and C = 0 at first, so that the network starts as plain removal; a bias gets
   b + Σ_k c_k ⊙ b_f^(k);
4. C, D, A, B, the biases and the norms' scales are trained so that the group without f maps u to y; W and W_f stay.

In the end all is folded, W <- W_eff: an ordinary checkpoint with fewer layers and no other parameters.

    small = jf.compress.fuse_layers(model, calibration, FuseConfig(rate=0.25), key=key).model
    jf.save(small, "model-25")
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from jaxformers import paths
from jaxformers.compress import depth
from jaxformers.compress.depth import Inputs, Layer
from jaxformers.compress.fusegpt_group import FuseConfig, graft, merged, train_group
from jaxformers.compress.fusegpt_state import State
from jaxformers.evaluation import perplexity

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Round:
    """One removal. Layers by their numbers in the original model. ``influence``: MI of each of ``layers``, the network
    as it was; the losses are means over all batches, of the group without the victim against the group with it."""

    victim: int
    layers: tuple[int, ...]
    influence: tuple[float, ...]
    group: tuple[int, ...]
    loss_before: float
    loss_after: float


@dataclasses.dataclass(frozen=True)
class Fused:
    """The smaller ``model``, what each round did, and perplexities where they were asked for. As text: a table."""

    model: nnx.Module = dataclasses.field(repr=False)
    rounds: tuple[Round, ...]
    perplexity_before: float | None = None
    perplexity_after: float | None = None

    @property
    def victims(self) -> tuple[int, ...]:
        return tuple(r.victim for r in self.rounds)

    def __str__(self) -> str:
        table = Table(title="fused layers", title_justify="left")
        for column in ("round", "victim", "its influence", "group", "loss before", "loss after"):
            table.add_column(column, justify="right", no_wrap=True)
        for i, r in enumerate(self.rounds):
            own = r.influence[r.layers.index(r.victim)]
            numbers = (f"{own:.3e}", f"{r.group[0]} – {r.group[-1]}", f"{r.loss_before:.4g}", f"{r.loss_after:.4g}")
            table.add_row(str(i), str(r.victim), *numbers)
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        said = "" if self.perplexity_before is None else (
            f"\nperplexity {self.perplexity_before:.4g} before, {self.perplexity_after:.4g} after"
        )  # fmt: skip
        return capture.get().rstrip() + said


def fuse_layers(
    model: nnx.Module,
    calibration: np.ndarray,
    config: FuseConfig = FuseConfig(),
    *,
    key: jax.Array,
    evaluation: np.ndarray | None = None,
    work_directory: str | Path | None = None,
) -> Fused:
    """``model``, a decoder (or LLaVA: its decoder; the tower and projector stay), with fewer layers; FuseGPT.

    ``calibration``: token ids (sequences, length), a multiple of ``config.batch_size`` sequences of full length.
    ``key``: of the coefficients' first values. ``evaluation``: windows of token ids (n, length) on which perplexity is
    measured before and after. ``work_directory``: the state after each round is kept there, and an interrupted call
    goes on where it stopped. The old model is untouched; the new one saves as an ordinary checkpoint.

    Raises ValueError: a rate that leaves fewer than two layers, ids or lengths that do not fit, a model that is no
    decoder, whose layers differ (naming both), or that is quantised, masked or adapted; a loss that is not finite.
    """
    decoder = depth.decoder_of(model)
    wanted = config.removed(len(decoder.layers))
    layers, inputs = depth.opened(model, calibration, config.batch_size)
    if config.influence_sequences > len(calibration):
        raise ValueError(f"calibration: {len(calibration)} sequences, influence_sequences={config.influence_sequences}")
    depth.with_layers(model, layers, range(wanted, len(layers)))  # refuses before anything is computed
    before = None if evaluation is None else perplexity(model, evaluation, evaluation.shape[1])
    dtypes = {path: leaf.dtype for path, leaf in paths.flatten(layers[0].params).items()}

    done: list[Round] = []
    state = None if work_directory is None else State(Path(work_directory), config, key, layers, inputs)
    if state is not None and (found := state.read()) is not None:
        done, layers = [Round(**told) for told in found[0]], found[1]
    for number in range(len(done), wanted):
        plain = [merged(layer, dtypes) for layer in layers]
        victim, influence = _victim(plain, inputs, config, done)
        layers, made = _round(layers, plain, victim, inputs, config, jax.random.fold_in(key, number), dtypes)
        done.append(dataclasses.replace(made, influence=influence))
        log.info("round %d: layer %d, loss %.4g -> %.4g", number, victim, made.loss_before, made.loss_after)
        if state is not None:
            state.write([dataclasses.asdict(r) for r in done], layers)
    small = depth.with_layers(model, [merged(layer, dtypes) for layer in layers], [layer.number for layer in layers])
    after = None if evaluation is None else perplexity(small, evaluation, evaluation.shape[1])
    return Fused(small, tuple(done), before, after)


def group_of(victim: int, layers: int, size: int) -> tuple[int, int]:
    """(first, last) layer of the group of ``size`` around ``victim``, by place among ``layers``; moved inwards at the
    ends, and all layers where there are no more than ``size``."""
    half = size // 2
    if layers <= size:
        return 0, layers - 1
    if victim < half:
        return 0, size - 1
    if victim + half - 1 > layers - 1:
        return layers - size, layers - 1
    return victim - half, victim + half - 1


def _victim(
    layers: Sequence[Layer], inputs: Inputs, config: FuseConfig, done: Sequence[Round]
) -> tuple[int, tuple[float, ...]]:
    """The number of the layer that goes next, and the influence of each of ``layers``; ties: the first of them."""
    numbers = [layer.number for layer in layers]
    if config.iterative or not done:
        few = Inputs(inputs.x[: config.influence_sequences // config.batch_size], inputs.context)
        known = dict(zip(numbers, depth.influence_of(layers, few).tolist(), strict=True))
    else:
        known = dict(zip(done[0].layers, done[0].influence, strict=True))
    return min(numbers, key=known.__getitem__), tuple(known[number] for number in numbers)


def _round(
    layers: list[Layer],
    plain: list[Layer],
    victim: int,
    inputs: Inputs,
    config: FuseConfig,
    key: jax.Array,
    dtypes: Mapping[str, Any],
) -> tuple[list[Layer], Round]:
    """One removal: steps 2 to 4 of the method."""
    numbers = [layer.number for layer in layers]
    place = numbers.index(victim)
    first, last = group_of(place, len(layers), config.group_size)
    u = depth.run(plain[:first], inputs.x, inputs.context)
    y = depth.run(plain[first : last + 1], u, inputs.context)
    donor = paths.flatten(plain[place].params)
    rest = [layer for layer in layers[first : last + 1] if layer.number != victim]
    students = [graft(layer, donor, config, jax.random.fold_in(key, layer.number)) for layer in rest]
    students, before, after = train_group(students, u, y, inputs.context, config, dtypes)
    group, means = tuple(numbers[first : last + 1]), (float(before.mean()), float(after.mean()))
    made = Round(victim, tuple(numbers), (), group, *means)
    return [*layers[:first], *students, *layers[last + 1 :]], made
