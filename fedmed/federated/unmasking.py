"""The server's part in a secure sum: it names who hides together, and has them open the sum."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from flwr.app import RecordDict

from fedmed.errors import UpdateRefused
from fedmed.federated.combiners.masked_sum import MaskedSum, Seeds, seeds_in
from fedmed.federated.member import Member
from fedmed.federated.wire import decode_update
from fedmed.types import Masking, Task, Weights

Ask = Callable[[Task], Iterable[tuple[str, RecordDict | str]]]


def masking_of(members: Iterable[Member]) -> Masking:
    """A new attempt at a sum of these sites. Its number is the time, so that those of a resumed run are larger."""
    return Masking(attempt=time.time_ns(), keys={member.name: member.masking for member in members})


def open_sum(combined: MaskedSum, task: Task, masking: Masking, ask: Ask) -> str | None:
    """Ask the sites whose updates are in a sum for what opens it.

    Args:
        combined: the sum; it is open afterwards.
        task: that the updates answered.
        masking: of that task.
        ask: sends a task to these sites and gives their answers.

    Returns:
        Why it stays closed, or None. Then nothing is known of any update.
    """
    joined, asked = combined.sites, sorted(masking.keys)
    nothing = np.zeros(0, np.float32)
    question = replace(
        task,
        kind="unmask",
        weights=Weights(parameters=nothing, buffers=nothing),
        vectors=MappingProxyType({}),
        masking=replace(masking, joined=joined),
    )
    seeds: dict[str, Seeds] = {}
    for site, answer in ask(question):
        try:
            if isinstance(answer, str):
                raise UpdateRefused(answer)
            seeds[site] = seeds_in(decode_update(answer).facts, site, joined=joined, asked=asked)
        except UpdateRefused as error:
            return f"the secure sum stays closed: {site}: {error}"
    try:
        combined.open_(seeds, asked)
    except UpdateRefused as error:
        return f"the secure sum stays closed: {error}"
    return None
