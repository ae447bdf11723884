"""Training: :func:`fit` and its parts."""

from jaxformers.train.checkpoint import CheckpointNotWritten, DamagedCheckpoint, load_params
from jaxformers.train.config import TrainConfig
from jaxformers.train.loop import FitResult, NonFiniteLoss, fit
from jaxformers.train.optim import OptimConfig, adafactor, make_optimizer, schedule
from jaxformers.train.sparse import keep_zeros, sharpest_rise, sparsity_probe

__all__ = [
    "CheckpointNotWritten",
    "DamagedCheckpoint",
    "FitResult",
    "NonFiniteLoss",
    "OptimConfig",
    "TrainConfig",
    "adafactor",
    "fit",
    "keep_zeros",
    "load_params",
    "make_optimizer",
    "schedule",
    "sharpest_rise",
    "sparsity_probe",
]
