"""What loading a drafter refuses: other files than its own safetensors, weights that are not those of its config
(before memory is taken for them), and weights that are not finite."""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .configuration_specformer import SpecFormerConfig

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
MOST_BYTES = 2**18
"""Of config.json, of an index and of the header of a weights file. Those of a drafter have a few thousand; to read
millions takes minutes, and gigabytes of memory."""
MOST_LISTED = 20
"""Of the keys that are wrong with a checkpoint, in the message about it."""


def check_checkpoint(
    model_class: type[PreTrainedModel], name, state_dict: dict | None = None, subfolder: str = "", **kwargs
) -> None:
    """Refuse what `model_class.from_pretrained(name, ...)` should not load. Only headers of the weights are read.

    Raises:
        ValueError: the files are damaged, are not those of a drafter, or do not fit the config.
        OSError: there is no config.json, or a file cannot be downloaded.
    """
    warn_without_links(name, subfolder)
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    files = [] if name is None else weight_files(name, subfolder, hub, **kwargs)
    if name is not None and state_dict is None and not files:
        return  # transformers says what is missing
    config = described_config(name, subfolder, hub, **kwargs)
    shapes = shapes_of(state_dict) if state_dict is not None else stored_shapes(files)
    with torch.device("meta"):
        expected = shapes_of(model_class(config).state_dict())
    common = expected.keys() & shapes.keys()
    refuse_misfits(
        name,
        missing_keys=expected.keys() - shapes.keys(),
        unexpected_keys=shapes.keys() - expected.keys(),
        other_shapes=[f"{key}: {shapes[key]}, not {expected[key]}" for key in common if shapes[key] != expected[key]],
    )


def warn_without_links(name, subfolder: str = "") -> None:
    """Say what to do where a checkout holds a file in the place of the link to its generation strategy, as git makes
    it on Windows; transformers would only say that there is no such folder."""
    if name is None or not os.path.isfile(place := os.path.join(name, subfolder, "custom_generate")):
        return
    warnings.warn(
        f"{place} is a file where it should be a link to the folder `generation`: this checkout was made without "
        "symbolic links, as on Windows, and generate(custom_generate=<this folder>) will not find the strategy. Call "
        "specformer.generate(target, drafter, ...), or save the drafter with drafter.save_pretrained(<other folder>), "
        "which writes real files, and pass that folder. `git config core.symlinks true`, then `git checkout .`, makes "
        "the link where Windows allows it.",
        stacklevel=3,
    )


def check_values(model: PreTrainedModel) -> None:
    """Refuse loaded weights that are not finite, and draft tokens that are none.

    Raises:
        ValueError: there are such.
    """
    weights = {key: weight for key, weight in model.state_dict().items() if not weight.is_meta}  # meta: offloaded
    not_finite = [key for key, weight in weights.items() if not weight.isfinite().all()]
    refuse_misfits(model.name_or_path, not_finite=not_finite)
    if (ids := weights.get("draft_token_ids")) is not None:
        numbers = ids.tolist()
        if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= model.config.vocab_size:
            refuse_misfits(model.name_or_path, draft_token_ids=["not ascending tokens of the vocabulary"])


def refuse_misfits(name, **problems) -> None:
    """Raise what is wrong with a checkpoint, if anything is. `problems`: keys, by what is wrong with them."""
    problems = {kind: listed(sorted(keys)) for kind, keys in problems.items() if keys}
    if problems:
        raise ValueError(
            f"The checkpoint {str(name)!r} does not hold the weights of the SpecFormer drafter that its config "
            f"describes: {problems}. Its config.json and its weights are not of one piece, or a field that was given "
            "to from_pretrained(...) does not fit them. Leave such fields out, or save both again with "
            "drafter.save_pretrained(...)."
        )


def listed(keys: list[str]) -> list[str]:
    """The first of `keys` for a message, none of them at full length if it is long."""
    more = [f"and {len(keys) - MOST_LISTED} more"] if len(keys) > MOST_LISTED else []
    return [key if len(key) <= 200 else f"{key[:200]}..." for key in keys[:MOST_LISTED]] + more


def check_size(what: str, num_bytes: int) -> None:
    """Refuse to read what is far longer than it is in any drafter.

    Raises:
        ValueError: it is.
    """
    if num_bytes > MOST_BYTES:
        raise ValueError(
            f"{what} has {num_bytes:,} bytes, and no drafter's has more than {MOST_BYTES:,}: it is damaged or hostile. "
            "Download the drafter again, or save it again with drafter.save_pretrained(...)."
        )


def weight_files(name, subfolder: str, hub: dict, config=None, variant: str | None = None, **kwargs) -> list[str]:
    """The safetensors files of a drafter, on this machine; none where transformers will not find any."""

    optional = dict(
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )

    def find(file: str, **how) -> str | None:
        try:
            return cached_file(name, file, subfolder=subfolder, **hub, **how)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of huggingface_hub's HTTP library, which is not the same in every version
            raise OSError(
                f"{file} of {str(name)!r} could not be downloaded ({type(error).__name__}: {error}). Try again when "
                "the connection is back; files that have arrived are not downloaded again."
            ) from error

    if os.path.isfile(os.path.join(subfolder, name)):
        raise ValueError(f"{str(name)!r} is a file; give the folder of a drafter, or its Hub id.")
    if config is None:
        if (file := find("config.json")) is None:
            # transformers would go on with a default config
            raise OSError(f"{str(name)!r} holds no config.json; it is not the folder or repository of a drafter.")
        check_size(file, os.path.getsize(file))
    if find("adapter_config.json", **optional) or (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        raise ValueError(
            f"{str(name)!r} holds an adapter_config.json, by which transformers would load other weights. A drafter "
            "has no adapters; remove the file."
        )
    if weights := find(f"model.{variant}.safetensors" if variant else "model.safetensors", **optional):
        return [weights]
    index = find(f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json", **optional)
    shards = [] if index is None else map(find, shards_of(index))
    return [file for file in shards if file is not None]


def shards_of(index: str) -> list[str]:
    """Names of the files of a sharded checkpoint."""
    check_size(index, os.path.getsize(index))
    try:
        shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} names no shards ({error}). Download the drafter again, or save it again.") from error
    if not all(isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", shard) for shard in shards):
        raise ValueError(f"{index} names files that are not safetensors next to it. Do not use this drafter.")
    if not shards:
        raise ValueError(f"{index} names no shards (it is empty). Download the drafter again, or save it again.")
    return sorted(shards)


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(weight.shape) for key, weight in weights.items()}


def stored_shapes(files: list[str]) -> dict[str, list[int]]:
    """Shapes of all tensors in safetensors files, by their headers."""
    shapes = {}
    for file in files:
        with open(file, "rb") as start:
            check_size(f"The header of {file}", int.from_bytes(start.read(8), "little"))
        with safe_open(file, framework="pt") as tensors:
            shapes.update({key: tensors.get_slice(key).get_shape() for key in tensors.keys()})  # noqa: SIM118
    return shapes


def described_config(name, subfolder: str, hub: dict, config=None, **kwargs) -> SpecFormerConfig:
    """The config that loading will use, with the fields that were given to it. All of them are checked together."""
    if isinstance(config, PreTrainedConfig):
        return SpecFormerConfig(**config.to_dict())
    fields, _ = SpecFormerConfig.get_config_dict(config or name, subfolder=subfolder, **hub)
    given = {field: kwargs[field] for field in inspect.signature(SpecFormerConfig).parameters if field in kwargs}
    return SpecFormerConfig(**{**fields, **given})
