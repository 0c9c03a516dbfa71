"""SpecFormer: lossless batched speculative decoding inside transformers' `generate()`.

`AutoConfig` and `AutoModel` load drafters with the code of this package once it is imported, see `registration`.
Names are looked up on first use, and absolutely, so that this file also imports where the folder has another name.
"""

from importlib import import_module

_HOMES = {
    "Drafter": "specformer.generation.drafter",
    "Proposal": "specformer.generation.drafter",
    "SpecFormerConfig": "specformer.configuration_specformer",
    "SpecFormerModel": "specformer.modeling_specformer",
    "generate": "specformer.generation.generate",
}
__all__ = ["Drafter", "Proposal", "SpecFormerConfig", "SpecFormerModel", "generate"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'specformer' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


if __name__ == "specformer":  # not where a tool imports this file by its folder
    import_module("specformer.registration").register()
