"""A smaller model of some of a model's own layers."""

from __future__ import annotations

import copy
import re

from specformer.generation.target_states import find_decoder


def keep_layers(target, count: int):
    """A smaller model of `count` of the target's own layers: two thirds from its beginning, one third from its end."""
    config = copy.deepcopy(target.config)
    last = count // 3
    layers = [*range(count - last), *range(config.num_hidden_layers - last, config.num_hidden_layers)]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    layer_list, weights = find_decoder(target)[1], {}
    called = next(name for name, module in target.named_modules() if module is layer_list)  # "model.layers"
    for name, weight in target.state_dict().items():
        match = re.search(rf"(?<=^{re.escape(called)}\.)\d+(?=\.)", name)
        if match is None:
            weights[name] = weight
        elif int(match[0]) in layers:
            weights[name[: match.start()] + str(layers.index(int(match[0]))) + name[match.end() :]] = weight
    small = type(target)(config).to(device=target.device, dtype=target.dtype).eval()
    small.load_state_dict(weights)
    small.generation_config = copy.deepcopy(target.generation_config)
    return small
