"""Recurrent layers, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from onnxslim.learn.door import Tensor, functional, torch
from onnxslim.learn.rows import Call, forward

# From what a step reads of the input, and the state before it, to the state after; hidden state first.
Step: TypeAlias = Callable[[Tensor, "tuple[Tensor, ...]"], "tuple[Tensor, ...]"]
_WEIGHTS = (1, 2, 3)


@forward("LSTM", weights=(*_WEIGHTS, 7))
def lstm(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    p: Tensor | None = None,
) -> list[Tensor]:
    def step_of(at: int) -> Step:
        f, g, last = _activations(call, at, ("Sigmoid", "Tanh", "Tanh"))
        peep = (0.0, 0.0, 0.0) if p is None else p[at].chunk(3)

        def step(read: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, cell = state
            gates = _clipped(call, read + hidden @ r[at].t())
            i, o, forget, new = gates.chunk(4, -1)
            i, forget = f(i + peep[0] * cell), f(forget + peep[2] * cell)
            forget = 1 - i if call.get("input_forget", 0) else forget
            cell = forget * cell + i * g(new)
            return f(o + peep[1] * cell) * last(cell), cell

        return step

    biases = None if b is None else _both(b)
    return _unrolled(call, x, w, biases, lengths, (h, c), r.shape[-1], step_of)


@forward("GRU", weights=_WEIGHTS)
def gru(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> list[Tensor]:
    size = r.shape[-1]

    def step_of(at: int) -> Step:
        f, g = _activations(call, at, ("Sigmoid", "Tanh"))
        gates, new = r[at].split([2 * size, size])
        late = torch.zeros_like(new[:, 0]) if b is None else b[at, 5 * size :]

        def step(read: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (hidden,) = state
            z, reset = f(_clipped(call, read[:, : 2 * size] + hidden @ gates.t())).chunk(2, -1)
            if call.get("linear_before_reset", 0):
                seen = reset * (hidden @ new.t() + late)
            else:
                seen = (reset * hidden) @ new.t() + late
            found = g(_clipped(call, read[:, 2 * size :] + seen))
            return ((1 - z) * found + z * hidden,)

        return step

    biases = None
    if b is not None:  # the last of the biases is within the reset
        first, second = b.chunk(2, -1)
        biases = first + functional.pad(second[:, : 2 * size], (0, size))
    return _unrolled(call, x, w, biases, lengths, (h,), size, step_of)


@forward("RNN", weights=_WEIGHTS)
def rnn(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> list[Tensor]:
    def step_of(at: int) -> Step:
        (f,) = _activations(call, at, ("Tanh",))
        return lambda read, state: (f(_clipped(call, read + state[0] @ r[at].t())),)

    return _unrolled(call, x, w, None if b is None else _both(b), lengths, (h,), r.shape[-1], step_of)


def _both(bias: Tensor) -> Tensor:
    """The biases of the input and of the state, which are added up."""
    first, second = bias.chunk(2, -1)
    return first + second


def _activations(call: Call, at: int, default: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    count = len(default)
    names = call.words("activations")[at * count : (at + 1) * count] or default
    known = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "softsign": functional.softsign,
    }
    for name in names:
        call.require(name.lower() in known, f"a recurrent layer with activation {name}")
    return [known[name.lower()] for name in names]


def _clipped(call: Call, gates: Tensor) -> Tensor:
    limit = call.get("clip", 0.0)
    return torch.clamp(gates, -limit, limit) if limit else gates


def _unrolled(
    call: Call,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    start: Sequence[Tensor | None],
    size: int,
    step_of: Callable[[int], Step],
) -> list[Tensor]:
    """All steps in all directions: outputs of each step, and the last states.

    Args:
        x: [steps, batch, inputs], or with layout 1 [batch, steps, inputs].
        w: [directions, gates, inputs].
        bias: [directions, gates].
        start: states before the first step, [directions, batch, size], or [batch, directions, size].
        step_of: the step of a direction.
    """
    batch_first = bool(call.get("layout", 0))
    if batch_first:
        x, start = x.transpose(0, 1), [None if each is None else each.transpose(0, 1) for each in start]
    backwards = {"forward": [False], "reverse": [True]}.get(call.get("direction", "forward"), [False, True])
    made, states = [], []
    for at, turned in enumerate(backwards):
        read = x @ w[at].t() if bias is None else x @ w[at].t() + bias[at]
        begin = tuple(x.new_zeros(x.shape[1], size) if each is None else each[at] for each in start)
        steps, last = _one_way(read, begin, step_of(at), lengths, turned)
        made.append(steps)
        states.append(last)
    outputs = [torch.stack(made, 1), *(torch.stack(each) for each in zip(*states, strict=True))]
    if batch_first:
        outputs = [outputs[0].permute(2, 0, 1, 3), *(each.transpose(0, 1) for each in outputs[1:])]
    return outputs


def _one_way(
    read: Tensor, state: tuple[Tensor, ...], step: Step, lengths: Tensor | None, turned: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs of every step in the order of time, and the last states, which a sample keeps past its end."""
    made: list[Tensor] = [None] * len(read)
    for time in reversed(range(len(read))) if turned else range(len(read)):
        after = step(read[time], state)
        if lengths is None:
            state, made[time] = after, after[0]
            continue
        runs = (time < lengths).unsqueeze(-1)
        state = tuple(torch.where(runs, new, old) for new, old in zip(after, state, strict=True))
        made[time] = torch.where(runs, after[0], torch.zeros_like(after[0]))
    return torch.stack(made), state
