"""The verbs of the ``jaxformers`` command that train, and that tell beforehand what training will take."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


def train(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|CONFIG.toml")],
    text: tuple[Path, ...] = (),
    out: Path | None = None,
    valid: Path | None = None,
    steps: int | None = None,
    batch: int | None = None,
    length: int | None = None,
    learning_rate: float | None = None,
    compute_dtype: Literal["float32", "bfloat16"] | None = None,
    scan_layers: bool | None = None,
    remat: Literal["full", "dots", "dots_no_batch"] | None = None,
    checkpoint_every: int | None = None,
    mesh: str | None = None,
    seed: int | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Train a language model on text files: a checkpoint goes on, a configuration begins from nothing.

    Decoders learn next tokens, encoders masked ones. The same command takes up an interrupted run; SIGTERM saves first.
    Several processes train as one: on TPU pods, under SLURM and Open MPI they find each other, elsewhere say
    --coordinator, --processes and --process. When one of them dies, the others end with code 75 and name the last
    checkpoint. The trained model is in OUT/model.

    Args:
        source: directory or hub id of a checkpoint; or a TOML file with the fields of jaxformers.train.text.TextRun and
            the tables [config] (a config.json), [train] and [train.optim].
        text: .txt, .jsonl, .csv or .tsv files (column text).
        out: directory for metrics, checkpoints and the model.
        valid: text that is measured on.
        steps: updates.
        batch: windows a step, of all processes together.
        length: tokens a window.
        learning_rate: at its peak.
        compute_dtype: of matrix products; masters are float32.
        scan_layers: run equal layers as one loop: compiles faster.
        remat: what is computed again in the backward pass instead of kept.
        checkpoint_every: steps between checkpoints.
        mesh: such as data=2,fsdp=4; default: no mesh, with several processes all devices along data.
        seed: of the batches, the masks, dropout and new weights.
        coordinator: host:port of process 0.
        processes: how many train together.
        process: which one this is, from 0.
    """
    from jaxformers.distributed import initialize

    initialize(coordinator, processes, process)
    from jaxformers.train.text import TextRun, read_toml, train_on_text

    values = read_toml(source) if source.endswith(".toml") else {"model": source}
    own = {"text": tuple(map(str, text)) or None, "out": out and str(out), "valid": valid and str(valid),
           "batch": batch, "length": length, "mesh": mesh, "seed": seed}  # fmt: skip
    values |= {name: value for name, value in own.items() if value is not None}
    for name in ("text", "out"):
        if name not in values:
            raise ValueError(f"{name}: say it with --{name}, or in the TOML file")
    settings = values.pop("train", TextRun.train)
    changes = {"steps": steps, "compute_dtype": compute_dtype, "scan_layers": scan_layers, "remat": remat,
               "checkpoint_every": checkpoint_every}  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    if learning_rate is not None:
        changes["optim"] = dataclasses.replace(settings.optim, learning_rate=learning_rate)
    result = train_on_text(TextRun(**values, train=dataclasses.replace(settings, **changes)))
    print(json.dumps({"step": result.step, **{k: result.last(k) for k in ("loss", *(["eval_loss"] if valid else []))}}))


def dry_run(
    model: Model,
    topology: str,
    mesh: str | None = None,
    step: Literal["train", "prefill", "decode"] = "train",
    batch: int | None = None,
    seq: int = 2048,
    head: str | None = None,
    optimizer: Literal["adamw", "lion", "adafactor"] = "adamw",
    remat: Literal["full", "dots", "dots_no_batch", "none"] = "full",
    scan_layers: bool = True,
    largest_batch: bool = True,
    timeout: float = 900.0,
    json_out: Path | None = None,
) -> None:
    """Compile a step for a TPU topology on this machine, without a TPU: does it fit, what does it cost and send?

    Prints the bytes on each device against its memory, FLOPs, collectives by kind and bytes, a step time estimated
    from the chip's peak numbers, and the largest batch that fits.

    Args:
        model: directory or config.json in the Hugging Face layout, hub id, a size such as llama-7b, or
            experiments.NAME for the paper preset of an experiment (inside the repository).
        topology: TPU generation and shape, such as v5p:4x4x4 or v5e:16x16.
        mesh: such as data=16,fsdp=64,tensor=1; default: all devices along fsdp.
        step: train (float32 masters, bfloat16 compute), prefill or decode (bfloat16).
        batch: sequences or images in all; default: one for each device along data and fsdp.
        seq: tokens a sequence, or slots of the cache.
        head: of the model; default: what its config.json says.
        optimizer: whose state is kept.
        remat: what is computed again in the backward pass instead of kept.
        scan_layers: run equal layers as one loop. Without, compiling takes longer the deeper the model.
        largest_batch: look for the largest batch that fits, by a few more compilations.
        timeout: seconds for each compilation.
        json_out: file for the report as JSON.
    """
    from jaxformers import dryrun
    from jaxformers.atomic import write_json_atomic

    if model.startswith("experiments."):
        argv = [sys.executable, "-m", model, "--dry-run", topology, *(("--mesh", mesh) if mesh else ())]
        raise SystemExit(subprocess.run([*argv, "--timeout", str(timeout)]).returncode)
    report = dryrun.dry_run(
        model, topology, mesh=mesh, step=step, batch=batch, seq=seq, head=head, optimizer=optimizer,
        remat=None if remat == "none" else remat, scan_layers=scan_layers, search=largest_batch, timeout=timeout,
    )  # fmt: skip
    print(report)
    if json_out is not None:
        write_json_atomic(json_out, report.to_json())
