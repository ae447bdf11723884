"""Reading compiled programs: which collectives a program runs, how often, and how many bytes each device sends.

Works on the text of optimised HLO, as ``jax.jit(f).lower(*args).compile().as_text()`` gives it. Bodies of loops count
as often as they run. Counting is how sharding rules are tested, and what dry runs report.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # other types end in their bits, f8e4m3fn and its like aside
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """``count`` executions in one run of the program; ``bytes`` that each device sends in all of them together."""

    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    shape: str
    opcode: str
    rest: str  # operands and attributes


def collectives(text: str, devices: int = 1) -> dict[str, Collective]:
    """{kind: :class:`Collective`} of a program; kinds that it does not use are left out.

    ``devices``: size of a group that the text leaves open. Bytes are what a ring needs: with n devices and a result of
    R bytes a gather sends R (n − 1) / n, a sum twice that, a scattered sum (n − 1) R, an exchange R (n − 1) / n, a
    permutation R.
    """
    found: dict[str, list[float]] = {}
    for kind, times, sent in _walk(text, devices):
        entry = found.setdefault(kind, [0, 0.0])
        entry[0] += times
        entry[1] += times * sent
    return {kind: Collective(int(found[kind][0]), found[kind][1]) for kind in KINDS if kind in found}


def _walk(text: str, devices: int) -> Iterator[tuple[str, int, float]]:
    """(kind, how often it runs, bytes sent each time) of every collective that is reached."""
    bodies, entry = _computations(text)
    stack = [(entry, 1, False)] if entry else []
    seen: set[str] = set()
    while stack:
        name, times, fused = stack.pop()
        for ins in bodies.get(name, ()):
            kind = ins.opcode.removesuffix("-start")
            if kind in KINDS:
                scattered = kind == "all-reduce" and "all-reduce-scatter" in name  # how XLA:TPU fuses the two
                channel = re.search(r"channel_id=\d+", ins.rest)
                if fused and not scattered and channel:  # a transfer is named again in each fusion that runs beside it
                    if channel[0] in seen:
                        continue
                    seen.add(channel[0])
                yield "reduce-scatter" if scattered else kind, times, _sent(kind, ins, devices, scattered)
                continue
            runs = times * (_trip_count(ins, bodies) if ins.opcode == "while" else 1)
            if ins.opcode in ("while", "fusion", "call", "conditional") or ins.opcode.startswith("async"):
                inside = fused or ins.opcode == "fusion"
                for called in _CALLED.findall(ins.rest):
                    stack += [(each.strip().removeprefix("%"), runs, inside) for each in called.split(",")]


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    bodies: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = None if line[:1] in (" ", "}", "") else _HEADER.match(line)
        if header:
            current = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and " = " in line:
            current.append(_instruction(line.split(" = ", 1)[1]))
    return bodies, entry


def _instruction(text: str) -> _Instruction:
    end = text.find(" ")
    if text.startswith("("):  # a tuple: up to its own closing bracket
        depth = 0
        for i, c in enumerate(text):
            depth += (c == "(") - (c == ")")
            if depth == 0:
                end = i + 1
                break
    opcode, _, rest = text[end:].strip().partition("(")
    return _Instruction(text[:end], opcode, rest)


def _trip_count(loop: _Instruction, bodies: dict[str, list[_Instruction]]) -> int:
    """As the compiler notes it, else the constant that the loop's condition compares with; 1 where there is neither."""
    known = re.search(r'known_trip_count"?:?\{"?n"?:"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    inside = bodies.get(condition[1], []) if condition else []
    limits = [int(i.rest.split(")")[0]) for i in inside if i.opcode == "constant" and re.match(r"-?\d+\)", i.rest)]
    return max([1, *limits])


def _sent(kind: str, ins: _Instruction, devices: int, scattered: bool) -> float:
    sizes = [_bytes(dtype, shape) for dtype, shape in _SHAPE.findall(ins.shape)]
    # an asynchronous start returns its operand, its result and a few words of context
    result = max(sizes, default=0.0) if ins.opcode.endswith("-start") and kind != "all-reduce" else sum(sizes)
    n = _group_size(ins.rest, devices)
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (n - 1)
    return result * (n - 1) / n * (2 if kind == "all-reduce" and not scattered else 1)


def _bytes(dtype: str, shape: str) -> float:
    bits = re.search(r"\d+$", dtype)  # a token or an opaque value has none
    bits = _BITS.get(dtype) or (8 if dtype.startswith("f8") else int(bits[0]) if bits else 0)
    return math.prod(int(n) for n in shape.split(",") if n) * bits / 8


def _group_size(rest: str, devices: int) -> int:
    """Devices that take part together, from one of the three notations of replica groups."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    return devices
