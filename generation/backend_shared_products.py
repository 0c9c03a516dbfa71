"""Linear layers of a module that is called token by token, for all tokens at once where that is the same.

Their weights are then read once per pass, and not once per token.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

LINEAR = {functional.linear, torch.ops.mkldnn._linear_pointwise}
SCALING = {torch.Tensor.mul, torch.Tensor.__mul__}


class SharedProducts(TorchFunctionMode):
    """While a module is called token by token, its linear layers get all tokens at once where they can.

    That is so where their input is the module's own, or comes of that through linear layers alone; and where their
    output is the module's, so that it is not needed before the last token.

    Args:
        width: tokens.
        last_weight: of the layer whose output is known to be the module's.
    """

    def __init__(self, width: int, last_weight: torch.Tensor | None):
        super().__init__()
        self.width, self.last_weight = width, last_weight
        self.token = 0
        self.parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> that tensor of one token, that of all
        self.products: dict[tuple[int, int], tuple] = {}  # ids of weight and input -> these, and their product
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []  # outputs of one token, and weights
        self.delayed: list[tuple] = []  # what stands for the output of a token, the last layer's input, and its product

    def part(self, value, token: int):
        """`value`, an argument of the module, for one token."""
        if token != self.token:
            self.token, self.parts = token, {}
        is_of_tokens = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == self.width
        return self._part(value) if is_of_tokens else value

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        part = whole[:, self.token : self.token + 1]
        self.parts[id(part)] = part, whole
        return part

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_scaling = function in SCALING and isinstance(args[1], float)
        if not is_scaling and function not in LINEAR:
            return function(*args, **kwargs)
        states, weight, *others = args
        if id(states) in self.parts:
            whole = self.parts[id(states)][1]
            name = id(weight), id(whole)
            if name not in self.products:
                self.products[name] = weight, whole, function(whole, weight, *others, **kwargs)
            return self._part(self.products[name][2])
        if weight is self.last_weight:
            stand_in = states.new_empty(*states.shape[:-1], 0)
            self.delayed.append((stand_in, states, lambda states: function(states, weight, *others, **kwargs)))
            return stand_in
        output = function(*args, **kwargs)
        if not is_scaling:
            self.made.append((output, weight))
        return output

    def weight_behind(self, output) -> torch.Tensor | None:
        """The weight of the layer that made the module's output of a token."""
        leaves = tree_leaves(output)
        found = (weight for made, weight in self.made if made.ndim == 3 and any(made is leaf for leaf in leaves))
        return next(found, None)

    def joined(self, outputs: list):
        """The outputs of all tokens as those of one call.

        Raises:
            RuntimeError: the layer whose output was the module's was so for some of the tokens only.
        """
        each = [tree_leaves(output) for output in outputs]
        joined = [
            torch.cat(values, dim=1) if isinstance(values[0], torch.Tensor) and values[0].ndim > 1 else values[-1]
            for values in zip(*each, strict=True)
        ]
        if self.delayed:
            places = [
                next((place for place, leaf in enumerate(leaves) if leaf is stand_in), None)
                for leaves, (stand_in, *_) in zip(each, self.delayed, strict=False)
            ]
            if places != places[:1] * self.width or places[0] is None:
                raise RuntimeError("A mixer did not treat the tokens of a pass alike.")
            _, _, multiply = self.delayed[0]
            joined[places[0]] = multiply(torch.cat([states for _, states, _ in self.delayed], dim=1))
        return tree_unflatten(joined, tree_structure(outputs[0]))
