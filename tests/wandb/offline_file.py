"""Reads the file that an offline run of Weights & Biases leaves on disk.

It is a log in LevelDB's format (seven bytes of header, then blocks of 32 KiB with records that may
be cut at their ends) of the protobuf messages that would otherwise go to the server.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32 * 1024
PART = struct.Struct("<IHB")  # crc32c, length, type
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """What the server would show of one run file.

    Attributes:
        id: the run's id.
        name: what it is called.
        group: what it belongs to.
        exit_code: 0 where it is shown as finished, else as failed.
        config: the configuration after all updates.
        updates: every update of the configuration, in order.
        history: one dictionary per row, in order.
        summary: the last value of everything, as the table of runs shows it.
    """

    id: str = ""
    name: str = ""
    group: str = ""
    exit_code: int = -1
    config: dict[str, Any] = field(default_factory=dict)
    updates: list[tuple[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def aux_rows(self) -> list[dict[str, float]]:
        """The rows that hold something of ours, without the clock of W&B."""
        kept = [
            {key: value for key, value in row.items() if not key.startswith("_")}
            for row in self.history
        ]
        return [row for row in kept if any(key.startswith("aux/") for key in row)]


def read(path: Path) -> OfflineRun:
    """The run in one ``.wandb`` file."""
    run, kind = OfflineRun(), None
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.name = record.run.run_id, record.run.display_name
            run.group = record.run.run_group
        if kind == "exit":
            run.exit_code = record.exit.exit_code
        if kind == "summary":
            run.summary |= dict(_items(record.summary.update))
        if kind == "history":
            run.history.append(dict(_items(record.history.item)))
        if kind in ("run", "config"):
            config = record.run.config if kind == "run" else record.config
            for key, value in _items(config.update):
                run.updates.append((key, value))
                run.config[key] = value
    assert kind == "exit", f"{path.name} ends with {kind}: the run has not been finished"
    return run


def _items(items: Any) -> Iterator[tuple[str, Any]]:
    for item in items:
        yield item.key or "/".join(item.nested_key), json.loads(item.value_json)


def _records(data: bytes) -> Iterator[Any]:
    assert data.startswith(HEADER)
    here, parts = len(HEADER), b""
    while here + PART.size <= len(data):
        left_in_block = BLOCK - here % BLOCK
        if left_in_block < PART.size:  # the end of a block is padded
            here += left_in_block
            continue
        _, length, kind = PART.unpack_from(data, here)
        here += PART.size
        parts += data[here : here + length]
        here += length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
