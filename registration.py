"""What transformers' auto classes know of drafters once the package is imported: its code loads them, and with
`trust_remote_code=True` their repository's own code still does.

transformers lets classes that are registered win over `trust_remote_code=True`, except its own ones. The config that is
registered therefore says to be one of those. Nobody gets one: to make it is to make a `SpecFormerConfig`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel

from .configuration_specformer import SpecFormerConfig
from .modeling_specformer import SpecFormerModel


class RegisteredConfig(SpecFormerConfig):
    __module__ = "transformers.models.specformer"

    def __new__(cls, *args, **kwargs) -> SpecFormerConfig:  # type: ignore[misc]  # not one of its own, on purpose
        return SpecFormerConfig(*args, **kwargs)


RegisteredConfig.__name__ = SpecFormerConfig.__name__  # by which transformers looks up the kind of a config


def register() -> None:
    """For this process. To do it again, or for another copy of the package, is fine: the last one counts."""
    AutoConfig.register(SpecFormerConfig.model_type, RegisteredConfig, exist_ok=True)
    AutoModel.register(SpecFormerConfig, SpecFormerModel, exist_ok=True)
