"""Tasks and updates as Flower records.

A network is one array of float32 and its buffers another: Flower pays per array and not per byte. The bytes are the
raw little-endian values, so that reading them is a view and not a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmed.errors import ConfigError, UpdateRefused
from fedmed.types import Masking, Task, Update, Weights

STYPE = "fedmed.raw"  # Array.stype: raw little-endian bytes, no header


def encode_vector(
    vector: NDArray[np.float32] | NDArray[np.float64] | NDArray[np.uint64], *, copy: bool = True
) -> Array:
    """One flat vector as a Flower array.

    Flower's own transports want bytes, a copy. Where the message is written into shared memory at once (`LocalGrid`),
    a view of the vector does.
    """
    little = vector.astype(vector.dtype.newbyteorder("<"), copy=False)
    array = Array(dtype=str(vector.dtype), shape=(vector.size,), stype=STYPE, data=b"")
    array.data = little.tobytes() if copy else cast(bytes, little.view(np.uint8).data)
    return array


def decode_vector(array: Array, dtype: Literal["float32", "float64", "uint64"] = "float32") -> NDArray[Any]:
    """The vector in a Flower array: a read-only view of its bytes.

    Raises:
        UpdateRefused: the array is of another kind, or its bytes do not fit its shape.
    """
    size = np.dtype(dtype).itemsize
    if array.stype != STYPE or array.dtype != dtype or len(array.shape) != 1:
        raise UpdateRefused(f"expected one flat {dtype} array, got {array.dtype} of {len(array.shape)} dimensions")
    if len(array.data) != array.shape[0] * size:
        raise UpdateRefused(f"an array of {array.shape[0]} {dtype} values came with {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype=np.dtype(dtype).newbyteorder("<"))


def encode_task(task: Task, *, copy: bool = True) -> RecordDict:
    """A task as the content of a Flower message; without `copy` a view of the task's vectors."""
    names = ("round", "kind", "layout", "evaluate", "learning_rate_factor", "centres", "settings", "run")
    facts = {name: getattr(task, name) for name in names} | {"counted": dict(task.counted)}
    if task.masking is not None:
        facts["masking"] = asdict(task.masking)
    content = RecordDict({"task": _facts(facts), "network": _network(task.weights, copy)})
    if task.vectors:
        content["vectors"] = _vectors(task.vectors, copy)
    return content


def decode_task(content: RecordDict) -> Task:
    """The inverse of `encode_task`.

    Raises:
        ConfigError: the message is no task.
    """
    try:
        facts = _read_facts(content, "task")
        if facts["kind"] not in ("train", "evaluate", "unmask"):
            raise ValueError(f"a kind that is none: {facts['kind']!r}")
        return Task(
            kind=cast(Literal["train", "evaluate", "unmask"], facts["kind"]),
            round=int(facts["round"]),
            settings=str(facts["settings"]),
            run=str(facts["run"]),
            layout=str(facts["layout"]),
            evaluate=bool(facts["evaluate"]),
            learning_rate_factor=float(facts["learning_rate_factor"]),
            centres=tuple(float(centre) for centre in facts["centres"]),
            vectors=_read_vectors(content),
            weights=_weights(content),
            masking=_masking(facts["masking"]) if "masking" in facts else None,
            counted={str(site): int(round) for site, round in facts["counted"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, UpdateRefused) as error:
        text = f"the message is no task: {type(error).__name__} on {error}"
        raise ConfigError(text, public="the server's message is of another fedmed version") from None


def encode_update(update: Update, *, copy: bool = True) -> RecordDict:
    """An update as the content of a Flower reply: the network, and all sums in one float64 vector."""
    facts = {
        "layout": update.layout,
        "encoding": update.encoding,
        "num-examples": update.num_examples,
        "facts": dict(update.facts),
        "sums": {name: int(values.size) for name, values in update.metrics.items()},
    }
    content = RecordDict({"update": _facts(facts)})
    if update.metrics:
        flat = np.concatenate([np.ravel(values) for values in update.metrics.values()]).astype(np.float64)
        content["metrics"] = _record({"sums": encode_vector(flat)})
    if update.weights is not None:
        content["network"] = _network(update.weights, copy)
    if update.masked is not None:
        content["masked"] = _record({"sum": encode_vector(update.masked, copy=copy)})
    return content


def decode_update(content: RecordDict) -> Update:
    """The inverse of `encode_update`.

    Raises:
        UpdateRefused: a record is missing or malformed.
    """
    try:
        facts = _read_facts(content, "update")
        metrics: dict[str, NDArray[np.float64]] = {}
        names: Mapping[str, int] = facts["sums"]
        if names:
            flat = decode_vector(cast(ArrayRecord, content["metrics"])["sums"], "float64").astype(np.float64)
            if flat.size != sum(names.values()):
                raise UpdateRefused(f"expected {sum(names.values())} sums, got {flat.size}")
            start = 0
            for name, size in names.items():
                metrics[name] = flat[start : start + size]
                start += size
        if facts["encoding"] != ("ring64" if "masked" in content else "float32"):
            raise UpdateRefused(f"unknown encoding {str(facts['encoding'])[:40]!r}")
        return Update(
            weights=_weights(content) if "network" in content else None,
            masked=_masked(content) if "masked" in content else None,
            layout=str(facts["layout"]),
            num_examples=int(facts["num-examples"]),
            metrics=metrics,
            facts=dict(facts["facts"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UpdateRefused(f"the reply is no update: {type(error).__name__} on {error}") from None


def _facts(values: Mapping[str, Any]) -> ConfigRecord:
    """Plain values as one JSON text: Flower checks the type of every entry of a record, again at every hop."""
    return ConfigRecord({"json": json.dumps(values)})


def _read_facts(content: RecordDict, name: str) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], json.loads(str(cast(ConfigRecord, content[name])["json"])))


def _network(weights: Weights, copy: bool) -> ArrayRecord:
    vectors = {"parameters": weights.parameters, "buffers": weights.buffers}
    return _record({name: encode_vector(vector, copy=copy) for name, vector in vectors.items() if vector.size})


def _weights(content: RecordDict) -> Weights:
    network, empty = cast(ArrayRecord, content["network"]), np.zeros(0, np.float32)
    vectors = {name: decode_vector(network[name]) if name in network else empty for name in ("parameters", "buffers")}
    return Weights(**vectors)


def _masking(values: Mapping[str, Any]) -> Masking:
    keys = {str(name): (str(key), str(signature)) for name, (key, signature) in values["keys"].items()}
    return Masking(attempt=int(values["attempt"]), keys=keys, joined=tuple(map(str, values["joined"])))


def _masked(content: RecordDict) -> NDArray[np.uint64]:
    return decode_vector(cast(ArrayRecord, content["masked"])["sum"], "uint64")


def _vectors(vectors: Mapping[str, NDArray[np.float32]], copy: bool) -> ArrayRecord:
    return _record({name: encode_vector(vector, copy=copy) for name, vector in vectors.items()})


def _read_vectors(content: RecordDict) -> dict[str, NDArray[np.float32]]:
    arrays = cast(ArrayRecord, content["vectors"]).items() if "vectors" in content else ()
    return {name: decode_vector(array) for name, array in arrays}


def _record(arrays: Mapping[str, Array]) -> ArrayRecord:
    record = ArrayRecord()  # its constructor would rebuild every Array
    for name, array in arrays.items():
        record[name] = array
    return record
