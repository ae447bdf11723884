"""AxFormer: take out of a fine-tuned encoder what hurts its validation loss, and harden attention where that helps.

Source: "AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more Accurate NLP Models",
arXiv 2010.03688, and its official code. With ℓ_i the loss of validation sample i under a candidate structure, b_i its
loss in the model as given, n samples and the mean over evaluation batches of their mean losses as ``loss``,

    accept  ⇔  loss < min_loss  and  #{i : ℓ_i ≤ b_i} > int(majority · n);      then min_loss ← loss

A greedy pass tries elements from coarse to fine, each on top of those accepted: hard attention in layer 0, 1, … (after
softmax each query keeps its K largest probabilities, not normalised again); then from the last layer to the first its
whole FFN and, where that is rejected with loss < slack · min_loss, its groups of ``group_size`` neurons one by one;
then its whole attention and likewise its heads. No gradients: one compiled evaluation, in which the structure is an
input (:mod:`jaxformers.gates`), so that a sample that an element does not touch keeps its loss bit by bit.

    found = axformer.specialise(model, validation, log="search.jsonl")      # validation: inputs and "labels"
    jf.save(found.model, "specialised")                                     # what was removed is really gone
    tuned = axformer.retrain(pretrained, found.structure, batches, TrainConfig(...), key=key)

What an element's removal means is what :mod:`jaxformers.gates` says: a post-norm block keeps its norm, a head its share
of the output projection's bias. Select on validation data, report on others.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import compaction, gates, nn, sites
from jaxformers.atomic import write_text_atomic
from jaxformers.compress.axformer_structure import Structure, hard_layers, masks_of
from jaxformers.functional import functional
from jaxformers.losses import sample_losses
from jaxformers.mesh import batch_ways
from jaxformers.train import FitResult, TrainConfig, fit, placement

log_ = logging.getLogger(__name__)
ELEMENTS = ("hard_attention", "blocks", "heads", "neuron_groups")
TARGETS = ("labels", "start_positions", "end_positions")
Losses = Callable[[Any, Mapping[str, jax.Array]], jax.Array]  # (output, batch) -> (B,)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate: ``kind`` ("hard", "ffn", "attn", "ffn_group", "head") of ``layer``, with its ``index`` (−1: all of
    it); its validation ``loss``, how many samples were no worse than in the model as given, and whether it was kept."""

    kind: str
    layer: int
    index: int
    loss: float
    improved: int
    accepted: bool


@dataclasses.dataclass(frozen=True)
class Specialised:
    """``structure`` that was found, ``model`` without what it removes, every trial in order, the losses before and
    after. ``complete``: the search came to its end within its budget. ``constant``: the model now gives every
    validation sample the same class, which it did not before."""

    structure: Structure
    model: nnx.Module
    trials: tuple[Trial, ...]
    base_loss: float
    min_loss: float
    complete: bool
    constant: bool

    @property
    def evaluations(self) -> int:
        return 1 + len(self.trials)


def specialise(
    model: nnx.Module,
    validation: Mapping[str, Any],
    *,
    elements: Sequence[str] = ELEMENTS,
    k: int = 30,
    slack: float = 1.1,
    majority: float = 0.5,
    group_size: int = 256,
    order: Sequence[int] | None = None,
    batch_size: int = 128,
    budget: int | None = None,
    log: str | Path | None = None,
    losses: Losses | None = None,
    test: Mapping[str, Any] | None = None,
) -> Specialised:
    """Search the structure of ``model`` (dropout off) that lowers the loss on ``validation``.

    ``validation``: the model's inputs and its targets, (n, …) each: ``labels`` (n,) classes or numbers, (n, L) of
    tokens with −100 for none, or ``start_positions`` and ``end_positions`` (n,). ``elements``: which kinds are tried;
    without "blocks" heads and groups are tried in every layer. ``order``: layers in the order of their pruning, by
    default the last first. ``budget``: evaluations at most, those in the log and the first included. ``log``: a file
    of JSON lines, one a trial, replaced as a whole each time; a search found there goes on where it stopped.
    ``losses``: another loss of each sample, ``losses(output, batch) -> (B,)``. ``test``: what is reported on later,
    given only to be compared: it must not be the validation set. A model on a mesh is evaluated on all its devices.

    Raises ValueError: no samples, or the test set as validation; targets missing; an unknown element; an option out of
    range; ``group_size`` that does not divide a layer's FFN; a model without a stack of attention and FFN blocks; a
    log of another search.
    """
    structure = Structure.whole(model, k, group_size)
    _check_options(structure, elements, k, slack, majority, order, budget)
    data = _checked_data(validation, test, losses)
    rows = len(next(iter(data.values())))
    evaluate = evaluator(
        model, data, k=k if "hard_attention" in elements else None, batch_size=batch_size, losses=losses
    )
    settings = {
        "elements": [e for e in ELEMENTS if e in elements], "k": k, "slack": slack, "majority": majority,
        "group_size": group_size, "order": None if order is None else list(order), "batch_size": batch_size,
        "fingerprint": _fingerprint(model, data),
    }  # fmt: skip
    known = [] if log is None else _read_log(Path(log), settings)

    base_loss, base, first_classes = evaluate(structure)
    min_loss, needed, trials = base_loss, int(majority * rows), []
    asking = proposals(structure, elements, slack, order)
    answer, complete = None, False
    while True:
        try:
            kind, layer, index = asking.send(answer)
        except StopIteration:
            complete = True
            break
        if budget is not None and 1 + len(trials) >= budget:
            break
        candidate = structure.without(kind, layer, index)
        if len(trials) < len(known):
            trial = known[len(trials)]
            if (trial.kind, trial.layer, trial.index) != (kind, layer, index):
                raise ValueError(f"log: line {len(trials) + 2} of {log} is not what this search tries next; remove it")
        else:
            loss, each, _ = evaluate(candidate)
            improved = int((each <= base).sum())
            trial = Trial(kind, layer, index, loss, improved, loss < min_loss and improved > needed)
        trials.append(trial)
        if log is not None and len(trials) > len(known):
            _write_log(Path(log), settings, base_loss, trials)
        answer = trial.accepted, trial.loss < slack * min_loss
        if trial.accepted:
            structure, min_loss = candidate, trial.loss
    classes = evaluate(structure)[2]
    constant = classes is not None and len(np.unique(classes)) == 1 < len(np.unique(first_classes))
    if constant:
        log_.warning("axformer: the specialised model gives all %d validation samples the same class", rows)
    small = specialised(model, structure)
    return Specialised(structure, small, tuple(trials), base_loss, min_loss, complete, constant)


def specialised(model: nnx.Module, structure: Structure) -> nnx.Module:
    """``model``, or another checkpoint of its architecture, with a saved ``structure``: what it removes is gone, and
    attention is hard where it says so. Saves and reloads.

    Raises ValueError for a structure of another depth, number of heads or width, and for typed weights (merge or
    dequantise them first).
    """
    structure.check(model)
    hard = hard_layers(structure)
    if hard:
        model = nn.hard_attention(model, [f"layers.{i}.attention" for i in hard], k=structure.k)
    return compaction.compact(model, masks_of(structure))


def retrain(
    model: nnx.Module, structure: Structure, data: Iterable, config: TrainConfig, *, key: jax.Array,
    losses: Losses | None = None, **options: Any,
) -> FitResult:  # fmt: skip
    """Fine-tune ``model``, the *pretrained* one, with the found ``structure`` fixed: the paper's last step.

    ``data``: batches of inputs and targets as in :func:`specialise`. ``options`` go to :func:`jaxformers.fit`; repeat
    with other keys for several seeds. Removed parts are not there and get no gradient (the official code zeroes them
    in the forward pass alone, so that their gradients move them). Raises ValueError as :func:`specialised`.
    """
    own = losses or sample_losses

    def objective(apply: Any, params: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, Any]]:
        return own(apply(params, _inputs(batch), rngs=key), batch).mean(), {}

    return fit(objective, specialised(model, structure), data, config, key=key, **options)


# ---- the search ------------------------------------------------------------------------------------------------------

Answer = tuple[bool, bool]  # accepted?  loss < slack · min_loss?


def proposals(
    structure: Structure, elements: Sequence[str], slack: float, order: Sequence[int] | None = None
) -> Generator[tuple[str, int, int], Answer | None, None]:
    """The elements to try, ``(kind, layer, index)``, each answer deciding on what is tried next."""
    if "hard_attention" in elements:
        for layer in range(len(structure.heads)):
            yield "hard", layer, -1
    for layer in reversed(range(len(structure.heads))) if order is None else order:
        groups = structure.widths[layer] // structure.group_size
        for block, part, count, wanted in (
            ("ffn", "ffn_group", groups, "neuron_groups" in elements),
            ("attn", "head", structure.heads[layer], "heads" in elements),
        ):
            if "blocks" in elements:
                accepted, near = yield block, layer, -1
                wanted = wanted and near and not accepted
            for index in range(count if wanted else 0):
                yield part, layer, index


def candidate(model: nnx.Module, k: int | None, losses: Losses | None = None) -> Callable[..., tuple[jax.Array, Any]]:
    """``run(params, batch, masks, hard) -> (losses of the samples, their classes)``: the structure as arrays, ``masks``
    as :func:`masks_of` gives them and ``hard`` {site of the probabilities: bool}; masks None: the model as it is."""
    apply, _ = functional(model)
    own = losses or sample_losses

    def run(params: Any, batch: Any, masks: Any, hard: Any) -> tuple[jax.Array, jax.Array | None]:
        if masks is None:
            out = apply(params, _inputs(batch))
        else:
            forward = gates.gated(apply, model, ("heads", "ffn", "sublayers"))
            if k is not None:
                harden = lambda probs, on: jnp.where(on, nn.keep_largest(probs, k), probs)
                forward = sites.edit(forward, {"layers.*.attention.probs": sites.Each(harden, hard)})
            out = forward(params, _inputs(batch), masks)
        classes = out.logits.argmax(-1) if out.logits is not None and out.logits.ndim == 2 else None
        return own(out, batch).astype(jnp.float32), classes

    return run


def evaluator(
    model: nnx.Module, data: Mapping[str, np.ndarray], *, k: int | None, batch_size: int, losses: Losses | None = None
) -> Callable[[Structure | None], tuple[float, np.ndarray, np.ndarray | None]]:
    """``structure -> (loss, losses of the samples, their classes)`` on ``data``; compiled once. ``k`` None: structures
    without hard attention, which leaves all attention its fused path. A structure None: the model as it is."""
    params = functional(model)[1]
    mesh = placement.mesh_of(params)  # weights on a mesh: each device has its share of the samples
    program = jax.jit(candidate(model, k, losses))
    rows = len(next(iter(data.values())))
    size = min(batch_size, rows)
    whole = size if mesh is None else -(-size // batch_ways(mesh)) * batch_ways(mesh)
    parts = []
    for start in range(0, rows, size):
        part = {name: array[start : start + size] for name, array in data.items()}
        real = len(next(iter(part.values())))
        padded = {name: np.concatenate([array, array[:1].repeat(whole - real, 0)]) for name, array in part.items()}
        parts.append((placement.put_batch(padded, mesh), real))

    def evaluate(structure: Structure | None) -> tuple[float, np.ndarray, np.ndarray | None]:
        masks = hard = None
        if structure is not None:
            masks, on = masks_of(structure), hard_layers(structure)
            hard = {f"layers.{i}.attention.probs": np.asarray(i in on) for i in range(len(structure.heads))}
        found = [(program(params, part, masks, hard), real) for part, real in parts]
        each = [np.asarray(losses_)[:real] for (losses_, _), real in found]
        classes = None if found[0][0][1] is None else np.concatenate([np.asarray(c)[:real] for (_, c), real in found])
        # the mean of batch means, as the official code has it: the last, shorter batch weighs as much as any other
        return float(np.mean([part.mean(dtype=np.float64) for part in each])), np.concatenate(each), classes

    evaluate.program = program
    return evaluate


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in TARGETS}


# ---- checks and the log ----------------------------------------------------------------------------------------------


def _check_options(
    structure: Structure, elements: Sequence[str], k: int, slack: float, majority: float,
    order: Sequence[int] | None, budget: int | None,
) -> None:  # fmt: skip
    unknown = [e for e in elements if e not in ELEMENTS]
    if unknown or not elements:
        raise ValueError(f"elements: expected some of {', '.join(ELEMENTS)}, got {unknown or 'none'}")
    if k < 1:
        raise ValueError(f"k: hard attention keeps at least one key, got {k}")
    if slack < 1 or not 0 <= majority < 1 or (budget is not None and budget < 1):
        raise ValueError(f"slack ≥ 1, 0 ≤ majority < 1 and budget ≥ 1 are needed, got {slack}, {majority}, {budget}")
    if "neuron_groups" in elements and any(n % structure.group_size for n in structure.widths):
        raise ValueError(f"group_size: {structure.group_size} does not divide the FFN widths {structure.widths}")
    depth = len(structure.heads)
    if order is not None and (len(set(order)) != len(order) or not set(order) <= set(range(depth))):
        raise ValueError(f"order: expected layers of 0 to {depth - 1}, each at most once, got {tuple(order)}")


def _checked_data(validation: Mapping[str, Any], test: Mapping[str, Any] | None, losses: Any) -> dict[str, np.ndarray]:
    data = {name: np.asarray(value) for name, value in validation.items()}
    sizes = {name: len(value) for name, value in data.items()}
    if not sizes or len(set(sizes.values())) != 1 or not min(sizes.values()):
        raise ValueError(f"validation: expected arrays of one common length, not 0, got {sizes or 'none'}")
    spans = {"start_positions", "end_positions"} <= data.keys()
    if losses is None and "labels" not in data and not spans:
        raise ValueError(f"validation: no labels (or start_positions and end_positions) among {', '.join(data)}")
    if test is not None and test.keys() == data.keys() and all(np.array_equal(data[n], test[n]) for n in data):
        raise ValueError("validation: it is the test set; select on one split and report on another")
    return data


def _fingerprint(model: nnx.Module, data: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in (*jax.tree.leaves(functional(model)[1]), *(data[name] for name in sorted(data))):
        digest.update(np.ascontiguousarray(array).view(np.uint8).tobytes())
    return digest.hexdigest()


def _write_log(file: Path, settings: Mapping[str, Any], base_loss: float, trials: Sequence[Trial]) -> None:
    lines = [{**settings, "base_loss": base_loss}, *(dataclasses.asdict(trial) for trial in trials)]
    write_text_atomic(file, "".join(json.dumps(line) + "\n" for line in lines))


def _read_log(file: Path, settings: Mapping[str, Any]) -> list[Trial]:
    if not file.exists():
        return []
    try:
        first, *lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        trials = [Trial(**line) for line in lines]
        differing = [name for name, value in settings.items() if first.get(name) != value]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"log: {file} is no log of a search ({error}); name another file") from None
    if differing:
        what = {"fingerprint": "weights or data"}.get(differing[0], differing[0])
        raise ValueError(f"log: {file} is of a search with other {what}; name another file")
    return trials
