"""Which residual streams can do without their mean, and why others cannot. See :mod:`jaxformers.compress.rmsnorm`."""

from flax import nnx

from jaxformers import nn, weights
from jaxformers.compress import rmsnorm_fold as folding
from jaxformers.compress.rmsnorm_fold import Form
from jaxformers.residual import Stream, at


def changed(model: nnx.Module, stream: Stream) -> str:
    """Which of the weights that are to change is no plain array, and what to do about it; "" when all are."""
    exits = (reader for way in stream.exits for reader in way.readers)
    branches = (path for branch in stream.branches for path in (*branch.writers, *branch.readers))
    for path in (*branches, *exits):
        kernel = getattr(at(model, path), "kernel", None)
        kernel = None if kernel is None else kernel.get_value()
        if weights.is_typed(kernel):
            return f"{path} has a {type(kernel).__name__}; merge low-rank updates before, quantise and prune afterwards"
    for path in (writer for branch in stream.branches for writer in branch.writers):
        if getattr(at(model, path), "adapter", None) is not None:
            return f"{path} has an adapter, which reads and writes what is to be recentred"
    return ""


def refusal(model: nnx.Module, stream: Stream, form: Form) -> str:
    """Why ``stream``, whose norms must be LayerNorms, cannot take ``form``; "" when it can."""
    where = f"the stream of {stream.path or type(model).__name__}"
    if not stream.prenorm:
        return f"{where} is post-norm: the output of its norms, γ and β included, is the residual stream itself"
    own = [norm for norm in stream.norms if norm != stream.entry_norm]
    if any(isinstance(at(model, norm), nn.RMSNorm) for norm in own):
        return f"{where} has RMSNorm already, and its vectors have a mean that RMSNorm reads"
    for way in stream.exits:
        reader = way.by or next(iter(way.readers), "the output projection" if way.tied else "")
        if way.norm is None and reader:
            return f"{where} is read by {reader} without a norm, which sees the mean that would be taken away"
        scale = way.norm and at(model, way.norm).scale
        if scale is not None and scale.get_value().shape[-1] != stream.width:
            return f"{where} is read by {way.norm} several vectors at a time, which sees that their means differ"
    if form.target == "zero-mean-ln" and not stream.linear:
        return f"{where} starts behind {stream.entry_norm or stream.entry}, where LayerNorm models recentre nothing"
    if form.target == "zero-mean-ln" and form.fold:
        folded = folding.folded_norms(model, stream)
        readers = [reader for norm in folded if at(model, norm).scale is not None for reader in folded[norm]]
        bare = [reader for reader in readers if at(model, reader).bias is None]
        bare += ["the output projection"] if stream.table_again == "exit" else []
        if bare:
            return f"fold_affine: {bare[0]} has no bias to take up β in an ordinary checkpoint; leave it out"
    if form.on_the_fly:
        return _no_training(model, stream, where)
    if not stream.linear and folding.entry_hook(model, stream) is None:
        return f"{where} starts in {stream.entry}, which has no place to recentre it"
    return ""


def _no_training(model: nnx.Module, stream: Stream, where: str) -> str:
    if any(branch.scale is not None for branch in stream.branches):
        return f"{where} has a layer scale behind its branches, which would give them a mean again"
    rate = max(stream.rate, *(branch.rate for branch in stream.branches))
    if rate > 0:
        return (
            f"{where} has dropout ({rate}) on what is added to it, which would give it a mean again: load the model "
            "with hidden_dropout_prob=0 (and embedding_dropout_prob=0)"
        )
    if folding.entry_hook(model, stream) is None and not folding.all_linear(model, stream):
        return f"{where} starts in {stream.entry or 'the model'}, which has no place to recentre it in every pass"
    return ""
