"""Read the files of Weights & Biases' offline runs, without its server."""

import json
import struct

import wandb
from wandb.proto.wandb_internal_pb2 import Record

_HEADER = 7
_BLOCK = 32768


def read_runs(folder):
    """Return the records of each offline run in a folder, in the order of their start."""
    wandb.teardown()  # Its process writes what it has received.
    return [_records(path.read_bytes()) for path in sorted(folder.glob("offline-run-*/*.wandb"))]


def history(records):
    """Return the rows that a run logged, each with "_step"."""
    return [
        {
            (item.key or item.nested_key[0]): json.loads(item.value_json)
            for item in each.history.item
        }
        for each in records
        if each.HasField("history")
    ]


def _records(data):
    """Parse LevelDB's log format: blocks of chunks [checksum, length, kind], after a header."""
    place, whole, found = _HEADER, b"", []
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        whole += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # The record is complete.
            found.append(Record.FromString(whole))
            whole = b""
    return found
