"""Dry runs: compile a step for a TPU topology on a machine that has none, and tell whether it fits and what it costs.

    report = dry_run("llama-7b", "v5p:4x4x4", mesh="fsdp=64", batch=64, seq=4096)
    print(report)          # bytes on each device, FLOPs, collectives, and a step time from the chip's peak numbers

libtpu compiles without a TPU. It may also abort or never end, so each compilation runs in a process of its own with a
time limit; what it could not finish is reported as such. What is compiled is the step itself: for training the one that
:func:`jaxformers.fit` compiles, with optimiser state and donated buffers, for inference prefill or one decoding step.
"""

import dataclasses
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxformers.chips import GIB, chip_of, devices_of
from jaxformers.hlo import Collective, collectives

STEPS = ("train", "prefill", "decode")
_MARK = "jaxformers dry run: "


@dataclasses.dataclass(frozen=True)
class Step:
    """A function and the shapes, with their shardings, that it is called with.

    ``donate``: numbers of the arguments whose buffers the result may take; ``out_shardings``: as for ``jax.jit``;
    ``parameters``: how many there are among the arguments; ``whole``: every device does all of it, nothing is spread.
    """

    name: str
    function: Callable
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    parameters: int = 0
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compilation told. Bytes are per device; ``memory`` is what a program may use of it.

    ``fits``: None where it could not be checked, and ``note`` says why. ``flops``: matrix products of the whole step on
    all devices, those that rematerialisation repeats included. ``parameters``: how many the step holds.
    ``largest_batch``: sequences (or images) of the largest batch that compiles within memory, 0 for none, None where
    it was not searched for.
    """

    name: str
    topology: str
    mesh: str
    devices: int
    memory: float
    fits: bool | None
    note: str = ""
    arguments: float = 0.0
    temporaries: float = 0.0
    outputs: float = 0.0
    code: float = 0.0
    parameters: int = 0
    flops: float = 0.0
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    largest_batch: int | None = None

    @property
    def used(self) -> float:
        """Bytes of a device's memory: arguments, temporaries, outputs that take no argument's place, code."""
        return self.arguments + self.temporaries + self.outputs + self.code

    @property
    def seconds(self) -> dict[str, float]:
        """The least time for the matrix products, for reading arguments and writing results once, and for what the
        links carry, each at the chip's peak: a roofline, not a measurement."""
        chip = chip_of(self.topology)
        sent = sum(c.bytes for c in self.collectives.values())
        return {
            "compute": self.flops / self.devices / chip.flops,
            "memory": (self.arguments + self.outputs) / chip.hbm,
            "links": sent / chip.ici,
        }

    def __str__(self) -> str:
        lines = [f"{self.name}; {self.topology} ({self.devices} devices), mesh {self.mesh}"]
        if self.fits is None:
            return "\n".join([*lines, f"could not check: {self.note}"])
        if not self.fits:
            lines.append(f"does not fit in {self.memory / GIB:.1f} GiB a device: {self.note}")
        else:
            parts = {"arguments": self.arguments, "temporaries": self.temporaries, "outputs": self.outputs,
                     "code": self.code}  # fmt: skip
            told = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
            lines.append(f"fits: {self.used / GIB:.2f} of {self.memory / GIB:.1f} GiB a device ({told})")
            lines.append(f"{self.parameters:,} parameters; matrix products {self.flops:.3g} FLOPs, "
                         f"{self.flops / self.devices:.3g} a device")  # fmt: skip
            sent = [f"{k} {c.count:,} ({c.bytes / 1e9:.3g} GB)" for k, c in self.collectives.items()]
            lines.append(f"collectives, and what a device sends: {', '.join(sent) or 'none'}")
            times = self.seconds
            told = ", ".join(f"{name} {1000 * t:.3g}" for name, t in times.items())
            lines.append(
                f"estimated from peak numbers, no measurement: at least {1000 * max(times.values()):.3g} ms a step if "
                f"all overlaps, {1000 * sum(times.values()):.3g} if nothing does ({told} ms)"
            )
            lines.append(f"compiled in {self.compile_seconds:.0f} s")
        if self.largest_batch is not None:
            lines.append(f"largest batch that fits: {self.largest_batch:,}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values; :func:`from_json` reads them back."""
        return {**dataclasses.asdict(self), "used": self.used, "estimated_seconds": self.seconds}


def from_json(record: Mapping[str, Any]) -> Report:
    """The inverse of :meth:`Report.to_json`."""
    names = {f.name for f in dataclasses.fields(Report)}
    values = {k: v for k, v in record.items() if k in names}
    values["collectives"] = {k: Collective(**c) for k, c in values["collectives"].items()}
    return Report(**values)


def dry_run(
    model: str,
    topology: str,
    *,
    mesh: str | None = None,
    step: str = "train",
    batch: int | None = None,
    seq: int = 2048,
    head: str | None = None,
    optimizer: str = "adamw",
    remat: str | None = "full",
    scan_layers: bool = True,
    search: bool = False,
    timeout: float = 900.0,
) -> Report:
    """Compile a step of ``model`` for ``topology`` in a process of its own.

    Args:
        model: a directory with config.json, such a file, a hub id, or a name of `jaxformers.dryrun_steps.NAMED`.
        topology: generation and shape, such as "v5p:4x4x4" (4 · 4 · 4 chips).
        mesh: as for `jaxformers.mesh`; default: all devices along fsdp.
        step: "train" (float32 masters, bfloat16 compute), "prefill" or "decode" (bfloat16; a cache of ``seq`` slots).
            Models without a cache have their forward pass as prefill.
        batch: sequences or images in all; default: one for each device along the batch's axes.
        seq: tokens a sequence.
        head: default: what config.json's architectures say, else the first head that the architecture has.
        remat, scan_layers: as for `jaxformers.functional`; an architecture whose layers differ needs
            ``scan_layers=False``.
        search: look for the largest batch that fits, by bisection: a few more compilations.
        timeout: seconds for each compilation.

    Raises ValueError for arguments that cannot be, before anything is compiled.
    """
    from jaxformers import dryrun_steps

    spec = {"model": model, "topology": topology, "mesh": mesh, "step": step, "batch": batch, "seq": seq, "head": head,
            "optimizer": optimizer, "remat": remat, "scan_layers": scan_layers}  # fmt: skip
    spec["batch"], unit = dryrun_steps.check(**spec)
    command = [sys.executable, "-m", "jaxformers.dryrun"]

    def attempt(batch: int) -> Report:
        given = json.dumps(spec | {"batch": batch})
        return run_child([*command, given], timeout, f"{model}, {step} step", topology, mesh or "fsdp")

    report = attempt(spec["batch"])
    if search and report.fits is not None:
        report = dataclasses.replace(report, largest_batch=largest_batch(attempt, spec["batch"], unit, report))
    return report


def largest_batch(attempt: Callable[[int], Report], batch: int, unit: int, first: Report, tries: int = 8) -> int:
    """The largest multiple of ``unit`` for which ``attempt(batch)`` fits, given that ``batch`` gave ``first``.

    Bisection, led by the line through the bytes of the batches that fitted. After ``tries`` further compilations, the
    largest that was seen to fit.
    """
    used = {batch // unit: first.used} if first.fits else {}
    low, high = (batch // unit, None) if first.fits else (0, max(1, batch // unit))
    for _ in range(tries):
        if high is not None and high - low <= 1:
            break
        guess = 2 * low if high is None else (low + high) // 2
        if len(used) > 1:
            (a, bytes_a), (b, bytes_b) = sorted(used.items())[-2:]
            slope = (bytes_b - bytes_a) / (b - a)
            guess = int(b + (first.memory - bytes_b) / slope) if slope > 0 else 4 * low
        if high is not None and guess >= high:  # the line has been refuted there
            guess = (low + high) // 2
        guess = max(guess, low + 1) if high is not None else min(max(guess, low + 1), 4 * max(low, 1))
        report = attempt(guess * unit)
        if report.fits:
            low, used[guess] = guess, report.used
        else:
            high = guess
    return low * unit


# ---- the process that compiles -------------------------------------------------------------------------------------


def run_child(command: Sequence[str], timeout: float, name: str, topology: str, mesh: str) -> Report:
    """Run a command that ends in :func:`child`; what it reported, or that it could not check.

    Raises ValueError with what the child found wrong with its arguments.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAXFORMERS_NO_CACHE": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    began = time.perf_counter()
    unchecked = Report(name, topology, mesh, 1, chip_of(topology).memory, None)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return dataclasses.replace(unchecked, note=f"the compiler had not ended after {timeout:.0f} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            record = json.loads(line.removeprefix(_MARK))
            if "error" in record:
                raise ValueError(record["error"])
            return from_json(record)
    told = next((line for line in done.stderr.splitlines() if "Error" in line or "Check failed" in line), "")
    seconds = time.perf_counter() - began
    note = f"the compiler ended with code {done.returncode} after {seconds:.0f} s: {told[:400]}"
    return dataclasses.replace(unchecked, note=note.rstrip(": "))


def child(build: Callable[[Any], Step], topology: str, mesh_text: str | None) -> None:
    """Compile ``build(mesh)`` for the topology and print the report for :func:`run_child`."""
    from jaxformers.mesh import mesh as make_mesh

    with tempfile.TemporaryDirectory() as dump:
        # read by XLA when it first compiles; libtpu cannot always print a compiled program, but always dumps it
        flags = (os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={dump}", "--xla_dump_hlo_as_text")
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()
        try:
            devices = devices_of(topology)
            text = mesh_text or f"fsdp={len(devices)}"
            record = compiled(build(make_mesh(text, devices)), topology, text, len(devices), dump).to_json()
        except (ValueError, ImportError) as error:
            record = {"error": str(error)}
    print(_MARK + json.dumps(record), flush=True)


def compiled(step: Step, topology: str, mesh_text: str, devices: int, dump: str) -> Report:
    """Compile ``step`` in this process. ``dump``: the directory that XLA writes its programs to."""
    import jax

    from jaxformers.cost import count_flops

    chip = chip_of(topology)
    report = Report(step.name, topology, mesh_text, devices, chip.memory, None)
    began = time.perf_counter()
    traced = jax.jit(step.function, donate_argnums=step.donate, out_shardings=step.out_shardings).trace(*step.args)
    flops = count_flops(traced.jaxpr) * (devices if step.whole else 1)
    report = dataclasses.replace(report, flops=flops, parameters=step.parameters)
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        told = str(error)
        fits = False if "RESOURCE_EXHAUSTED" in told or "Ran out of memory" in told else None
        return dataclasses.replace(report, fits=fits, note=(told.splitlines() or [""])[0][:400])
    sizes = program.memory_analysis()
    report = dataclasses.replace(
        report,
        fits=True,
        arguments=float(sizes.argument_size_in_bytes),
        temporaries=float(sizes.temp_size_in_bytes),
        outputs=float(sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
        code=float(sizes.generated_code_size_in_bytes),
        collectives=collectives(_text(program, dump), devices),
        compile_seconds=time.perf_counter() - began,
    )
    if report.used > chip.memory:
        return dataclasses.replace(report, fits=False, note=f"{report.used / GIB:.1f} GiB are needed")
    return report


def _text(program: Any, dump: str) -> str:
    """The optimised program, from the largest dump (the step; helpers are small)."""
    files = glob.glob(f"{glob.escape(dump)}/*after_optimizations.txt")
    if not files:
        return program.as_text()
    with open(max(files, key=os.path.getsize), encoding="utf-8", errors="replace") as file:
        return file.read()


def main() -> None:
    """What the child process runs: one argument, the JSON that :func:`dry_run` made."""
    from jaxformers import dryrun_steps

    spec = json.loads(sys.argv[1])
    topology, mesh = spec.pop("topology"), spec.pop("mesh")
    child(lambda devices: dryrun_steps.model_step(mesh=devices, **spec), topology, mesh)


if __name__ == "__main__":
    main()
