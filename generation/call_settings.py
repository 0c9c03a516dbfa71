"""What one call says about a generation parameter."""

from __future__ import annotations

from typing import Any


class CallSettings:
    """Keyword arguments come before the passed generation config, and that before the model's own.

    Args:
        kwargs: keyword arguments for transformers' generate(); `take` changes them.
        configs: generation configs, the most important one first.
    """

    def __init__(self, kwargs: dict, *configs):
        self.kwargs = kwargs
        self.configs = [config for config in configs if config is not None]

    def get(self, name: str) -> Any:
        """The value that this call gives the parameter, `None` if not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        return next((value for config in self.configs if (value := getattr(config, name, None)) is not None), None)

    def take(self, name: str) -> Any:
        """The same, and hide it from transformers' generate(), which would act on it in its own way."""
        value = self.get(name)
        self.kwargs.pop(name, None)
        if any(getattr(config, name, None) is not None for config in self.configs):
            self.kwargs[name] = None
        return value
