"""Scalars in TensorBoard's file format, written without TensorBoard: TFRecord frames around `Event` messages."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
    """`events.out.tfevents.<time>.<host>` in ``directory``; `tensorboard --logdir` reads it while it grows."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1_000_000_000:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("ab")
        self._event(_bytes(3, b"brain.Event:2"))

    def write(self, record: Mapping[str, Any]) -> None:
        """The numbers of a record as scalars ``<kind>/<name>`` at its step; records without a step are left out."""
        if "step" not in record:
            return
        scalars = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        summary = b"".join(
            _bytes(1, _bytes(1, f"{record['kind']}/{name}".encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in scalars.items()
        )
        self._event(b"\x10" + _varint(record["step"]) + _bytes(5, summary))

    def close(self) -> None:
        self._file.close()

    def _event(self, fields: bytes) -> None:
        data = b"\x09" + struct.pack("<d", time.time()) + fields  # field 1: wall time
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_crc(length) + data + _masked_crc(data))
        self._file.flush()


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _bytes(field: int, value: bytes) -> bytes:
    """A length-delimited protocol-buffer field."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _crc_table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)  # CRC-32C, reflected
        table.append(n)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
