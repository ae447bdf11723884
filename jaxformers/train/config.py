"""The settings of a training run."""

import dataclasses
from typing import Literal

from jaxformers.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Counts are steps: one step consumes one batch and makes one update.

    - ``accumulate``: micro-batches that a batch is split into, run one after another. Not for losses that compare the
      examples of a batch with one another (`jaxformers.train.gradient_cache` is for those).
    - ``compute_dtype``: dtype that the objective sees parameters in; None leaves each in its own. The masters that the
      optimiser updates are float32 in any case.
    - ``trainable``, ``freeze``: path patterns. None trains every floating-point array but the scales of packed
      weights; of parameters that carry LoRA updates or adapters only these and classification heads, as PEFT does. The
      scales of packed weights are trained where a pattern names them (``**.kernel.scales``).
    - ``ema``: decay of a moving average of the parameters; evaluation then uses the average.
    - ``remat``, ``scan_layers``: handed to `jaxformers.functional` when `fit` is given a model.
    - ``eval_every``: 0 evaluates at the end only. ``checkpoint_every``: 0 saves on SIGTERM only.
    - ``best``: a metric of evaluation, such as "eval_loss", whose best checkpoint is kept besides the newest ``keep``.
    - ``peer_timeout``: seconds that one of several processes waits for the others before it takes one of them for dead,
      and ends with exit code 75.
    - ``on_nan``: "stop" raises `NonFiniteLoss`; "skip" leaves the update out, at most ``max_skips`` in a row.
    """

    steps: int
    optim: OptimConfig = OptimConfig()
    accumulate: int = 1
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    trainable: tuple[str, ...] | None = None
    freeze: tuple[str, ...] = ()
    ema: float | None = None
    remat: str | None = None
    scan_layers: bool = False
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 3
    best: str | None = None
    best_mode: Literal["min", "max"] = "min"
    resume: bool = True
    on_nan: Literal["stop", "skip"] = "stop"
    max_skips: int = 50
    peer_timeout: float = 300.0
    progress: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field, low in (("steps", 1), ("accumulate", 1), ("log_every", 1), ("eval_every", 0), ("keep", 1),
                           ("checkpoint_every", 0), ("max_skips", 0)):  # fmt: skip
            if getattr(self, field) < low:
                raise ValueError(f"{field}: expected {low} or more, got {getattr(self, field)}")
        choices = {"compute_dtype": (None, "float32", "bfloat16"), "best_mode": ("min", "max"),
                   "on_nan": ("stop", "skip")}  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: expected one of {allowed}, got {getattr(self, field)!r}")
        if not self.peer_timeout > 0:
            raise ValueError(f"peer_timeout: expected more than 0 seconds, got {self.peer_timeout}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema: expected a decay between 0 and 1, got {self.ema}")
