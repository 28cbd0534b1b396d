"""torch's nn.LSTM, step by step: its fused operation does not say what its inner products were given and got back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.errors import ModelError
from fedmed.training.clipping.linear import product
from fedmed.training.clipping.recording import Recording

State = tuple[Tensor, Tensor]


def lstm(
    name: str, module: nn.LSTM, recording: Recording, sequence: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """What the module returns for a sequence (n, steps, features), or (steps, n, features) as it is set to read it.

    c = σ(f) c + σ(i) tanh(g),  h = σ(o) tanh(c),  (i, f, g, o) = W x + b + U h + b'  (torch.nn.LSTM).
    """
    if not isinstance(sequence, Tensor) or sequence.dim() != 3:
        raise ModelError(f"layer {name} needs a batch of sequences of one length; packed sequences are not supported")
    sequence = sequence if module.batch_first else sequence.transpose(0, 1)  # (n, steps, features)
    directions = 2 if module.bidirectional else 1
    memory, cells = [], []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            start = None if state is None else (state[0][number], state[1][number])
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            read = sequence.flip(1) if direction else sequence
            output, (hidden, cell) = _one_way(name, module, recording, suffix, read, start)
            outputs.append(output.flip(1) if direction else output)
            memory.append(hidden)
            cells.append(cell)
        sequence = torch.cat(outputs, dim=2)  # (n, steps, directions * units)
        if layer + 1 < module.num_layers:
            sequence = F.dropout(sequence, module.dropout, module.training)
    output = sequence if module.batch_first else sequence.transpose(0, 1)
    return output, (torch.stack(memory), torch.stack(cells))


def _one_way(
    name: str, module: nn.LSTM, recording: Recording, suffix: str, sequence: Tensor, state: State | None
) -> tuple[Tensor, State]:
    own = module._parameters
    of_input, of_memory = own[f"weight_ih{suffix}"], own[f"weight_hh{suffix}"]
    if of_input is None or of_memory is None:
        raise ModelError(f"layer {name} has lost its weights")
    shift, more = own.get(f"bias_ih{suffix}"), own.get(f"bias_hh{suffix}")
    inputs = product(name, recording, sequence, of_input, shift)  # (n, steps, 4 units): all steps in one product
    nothing = inputs.new_zeros(len(inputs), module.hidden_size)
    hidden, cell = (nothing, nothing) if state is None else state
    outputs = []
    for step in range(sequence.shape[1]):
        gates = inputs[:, step] + product(name, recording, hidden, of_memory, more)
        enter, forget, new, leave = gates.chunk(4, dim=1)  # (n, units) each
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        outputs.append(hidden)
    return torch.stack(outputs, dim=1), (hidden, cell)
