"""States of a prompt that keep what concepts add to them while other nodes compute with them.

ComfyUI's nodes compute on the states of a CONDITIONING and may lose its dictionary: Conditioning Concat and
Average keep the dictionary of one prompt only, and encoding with scheduled hooks drops it. `PromptStates` are
a tensor that applies the same operation to the layer copies and to the strengths of word-bound concepts, as
torchvision's TVTensors do with their metadata. The conditions reach the UNet through the dictionary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from .sites import OFFSETS, STRENGTHS, WORDS, OffsetCond, SlotCond

# Operations by name. They move rows and tokens, or are linear.
_MOVES = {"to", "cpu", "cuda", "clone", "contiguous", "detach", "float", "half", "bfloat16", "__getitem__",
          "narrow", "repeat"}
_JOINS = {"cat", "concat", "concatenate"}
_ADDS = {"add", "sub", "__add__", "__radd__", "__sub__", "lerp"}
_SCALES = {"mul", "multiply", "div", "__mul__", "__rmul__", "__truediv__"}


class PromptStates(Tensor):
    """States `[B, N, D]`, the mean over layer copies.

    Attributes:
        carried: `[B, N, L * D + K]`: the layer copies minus their mean, then the strengths of K word-bound
            concepts at every token.
        codes: The codes of these K concepts.
    """

    carried: Tensor
    codes: tuple[int, ...]

    @classmethod
    def of(cls, states: Tensor, offsets: Tensor, strengths: Mapping[int, Tensor]) -> PromptStates:
        """offsets: layer copies minus their mean, `[B, L, N, D]`; L = 0 where all sites read the states.
        strengths: code -> `[B, N]`."""
        columns = [strength.to(states).unsqueeze(-1) for strength in strengths.values()]
        carried = torch.cat([offsets.transpose(1, 2).flatten(2), *columns], -1)
        return cls._made(states, carried, tuple(strengths))

    @classmethod
    def _made(cls, states: Tensor, carried: Tensor, codes: tuple[int, ...]) -> PromptStates:
        made = states.as_subclass(cls)
        made.carried, made.codes = carried, codes
        return made

    @property
    def plain(self) -> Tensor:
        """The states as an ordinary tensor."""
        return self.as_subclass(Tensor)

    @property
    def offsets(self) -> Tensor:
        """`[B, L, N, D]`."""
        width = self.carried.shape[-1] - len(self.codes)
        shape = width // self.shape[-1], self.shape[-1]
        return self.carried[..., :width].unflatten(-1, shape).transpose(1, 2)

    @property
    def strengths(self) -> dict[int, Tensor]:
        """Code -> `[B, N]`."""
        columns = self.carried[..., self.carried.shape[-1] - len(self.codes):].unbind(-1)
        return dict(zip(self.codes, columns, strict=True))

    def conditions(self) -> dict:
        """Model conditions for a CONDITIONING's dictionary."""
        return conditions_of(self.offsets, self.strengths if self.codes else None)

    def __reduce_ex__(self, protocol):
        return self.plain.__reduce_ex__(protocol)      # files hold the states alone

    def __deepcopy__(self, memo):
        return self._made(copy.deepcopy(self.plain, memo), copy.deepcopy(self.carried, memo), self.codes)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            has_more = any(isinstance(value, Tensor) for value in kwargs.values())
            if type(result) is not Tensor or result.ndim != 3 or has_more:
                return result
            aligned = _aligned(getattr(func, "__name__", ""), args)
            if aligned is None:
                return result
            new_args, codes, width, columns = aligned
            carried = func(*new_args, **kwargs)
            fits = carried.shape == (*result.shape[:2], columns) and result.shape[2] == width
            return cls._made(result, carried, codes) if fits else result


def _aligned(name: str, args: tuple) -> tuple[list, tuple[int, ...], int, int] | None:
    """The arguments of an operation with `carried` in place of states, the codes of its last columns, D, and
    the number of its columns. None if the operation is not one that carries anything along.
    """
    members = list(_states_in(args))
    if not members or name not in _MOVES | _JOINS | _ADDS | _SCALES:
        return None
    width = members[0].shape[2]
    codes = tuple(dict.fromkeys(code for member in members for code in member.codes))
    layers = max(member.carried.shape[2] - len(member.codes) for member in members)
    columns = layers + len(codes)

    def carried(value):
        if isinstance(value, PromptStates):
            own = value.carried.shape[2] - len(value.codes)
            strengths, empty = value.strengths, value.carried.new_zeros(value.shape[:2])
            last = [strengths.get(code, empty).unsqueeze(-1) for code in codes]
            # a prompt with one copy has no differences from it
            return torch.cat([pad(value.carried[..., :own], (0, layers - own)), *last], -1)
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[2] == width:
            return value.new_zeros(*value.shape[:2], columns)
        return value

    if name in _MOVES:
        return [carried(args[0]), *args[1:]], codes, width, columns
    if name in _JOINS:
        return [[carried(value) for value in args[0]], *args[1:]], codes, width, columns
    others = [value for value in args[:2] if not isinstance(value, PromptStates)]
    if name in _SCALES:      # by numbers, or by a number per token
        fits = len(others) == 1 and (not isinstance(others[0], Tensor) or others[0].ndim == 0
                                     or others[0].shape[-1] == 1)
    else:
        fits = all(isinstance(value, Tensor) and value.ndim == 3 for value in others)
    return ([carried(value) for value in args], codes, width, columns) if fits else None


def _states_in(args: Iterable) -> Iterator[PromptStates]:
    for value in args:
        if isinstance(value, PromptStates):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _states_in(value)


def conditions_of(offsets: Tensor, strengths: Mapping[int, Tensor] | None) -> dict:
    """Model conditions for a CONDITIONING's dictionary.

    Args:
        offsets: Layer copies minus their mean, `[B, L, N, D]`. L = 0 where all sites read the states.
        strengths: Code of a word-bound concept -> its strength at every token, `[B, N]`. None where no
            concept is word-bound.
    """
    conditions = {OFFSETS: OffsetCond(offsets)} if offsets.shape[1] else {}
    if strengths is None:
        return conditions
    empty = offsets.new_zeros(offsets.shape[0], offsets.shape[2])
    slots = [(empty.long(), empty)]      # codes and strengths; concepts at one token need a slot each
    for code, strength in strengths.items():
        codes = code * (strength != 0).long()
        free = [i for i, (taken, _) in enumerate(slots) if not bool(((taken != 0) & (codes != 0)).any())]
        if free:
            slots[free[0]] = slots[free[0]][0] + codes, slots[free[0]][1] + strength
        else:
            slots.append((codes, strength))
    taken, values = (torch.stack(parts, 1).unsqueeze(-1) for parts in zip(*slots, strict=True))
    return conditions | {WORDS: SlotCond(taken), STRENGTHS: SlotCond(values)}


def settled(condition: dict) -> dict:
    """A condition of ComfyUI's sampler with what its states carry, as model conditions."""
    states = condition.get("cross_attn")
    if not isinstance(states, PromptStates):
        return condition
    return {**condition, "cross_attn": states.plain,
            "model_conds": {**condition.get("model_conds", {}), **states.conditions()}}


def settle(executor, *args, **kwargs):
    """ComfyUI wrapper around one sampling: its conditions get what the states carry."""
    guider = executor.class_obj
    guider.conds = {kind: [settled(condition) for condition in conditions]
                    for kind, conditions in guider.conds.items()}
    return executor(*args, **kwargs)


def carried_by(conditioning) -> tuple[Tensor, dict]:
    """States and model conditions of the first entry of a CONDITIONING."""
    states, extra = conditioning[0]
    conditions = extra.get("model_conds", {})
    if not isinstance(states, PromptStates):
        return states, conditions
    return states.plain, {**conditions, **states.conditions()}


def with_strength(conditioning, code: int, strength: float):
    """Returns a CONDITIONING in which a concept's deltas act at every token.

    Args:
        conditioning: Output of ComfyUI's text nodes.
        code: The concept's code.
        strength: Factor on its deltas.
    """
    def changed(states: Tensor, extra: dict) -> list:
        if not isinstance(states, PromptStates):
            offsets = extra.get("model_conds", {}).get(OFFSETS)
            copies = states.new_zeros(states.unsqueeze(1).shape) if offsets is None else offsets.cond
            states = PromptStates.of(states, copies, {})
        strengths = {**states.strengths, code: states.plain.new_full(states.shape[:2], strength)}
        states = PromptStates.of(states.plain, states.offsets, strengths)
        return [states, {**extra, "model_conds": {**extra.get("model_conds", {}), **states.conditions()}}]

    return [changed(states, extra) for states, extra in conditioning]
