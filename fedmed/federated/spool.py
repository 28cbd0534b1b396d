"""Messages between the processes of one machine: small headers as JSON, arrays in shared memory-mapped files.

A slot is a file that both sides map. Slots are used again, so in steady state an array costs one copy on each side;
updates that arrive before their turn wait in their slots, on disk and not in anyone's heap. Nothing is pickled.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

KINDS: dict[str, type[ConfigRecord] | type[MetricRecord]] = {"config": ConfigRecord, "metric": MetricRecord}
ALIGNMENT = 64  # bytes; every array starts on a cache line


class Spool:
    """The slots of one machine, as one process sees them."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which must exist; every process opens the slots that it touches."""
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def write(self, slot: str, content: RecordDict) -> bytes:
        """Put a message's arrays into `slot` and return its header.

        Raises:
            OSError: the disk is full.
        """
        offset = 0
        records: list[list[Any]] = []
        views: list[tuple[int, bytes | memoryview]] = []
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                arrays = []
                for key, array in record.items():
                    arrays.append([key, array.dtype, list(array.shape), array.stype, offset, len(array.data)])
                    views.append((offset, array.data))
                    offset += -(-len(array.data) // ALIGNMENT) * ALIGNMENT
                records.append([name, "arrays", arrays])
            else:
                kind = "config" if isinstance(record, ConfigRecord) else "metric"
                records.append([name, kind, dict(record)])
        if views:
            target = self._map(slot, max(offset, 1))
            for start, data in views:
                target[start : start + len(data)] = data
        return json.dumps({"slot": slot, "size": offset, "records": records}).encode()

    def read(self, header: bytes) -> RecordDict:
        """The message behind a header; its arrays are views of the slot until the slot is written again."""
        fields = json.loads(header)
        view = memoryview(self._map(fields["slot"], fields["size"])) if fields["size"] else memoryview(b"")
        content = RecordDict()
        for name, kind, values in fields["records"]:
            if kind == "arrays":
                record = ArrayRecord()
                for key, dtype, shape, stype, start, size in values:
                    array = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=b"")
                    array.data = cast(bytes, view[start : start + size])
                    record[key] = array
                content[name] = record
            else:
                content[name] = KINDS[kind](cast(dict[str, Any], values))
        return content

    def _map(self, slot: str, size: int) -> mmap.mmap:
        known = self._maps.get(slot)
        if known is not None and len(known) >= size:
            return known
        descriptor = os.open(self._folder / slot, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size < size:
                # Not ftruncate where it can be helped: writing into a hole on a full disk ends a process by SIGBUS.
                grow = getattr(os, "posix_fallocate", lambda fd, _, length: os.ftruncate(fd, length))
                grow(descriptor, 0, size)
            self._maps[slot] = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        return self._maps[slot]
