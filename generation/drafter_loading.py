"""Drafters from folders or Hub repositories, of other projects among them, or from models that are loaded already.

A checkpoint of another project is a config.json and safetensors: no code of it is run and no pickle read. Shapes are
compared with those that the config asks for before memory is taken for the weights.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import cached_file

from .drafter_dflash_network import DFlashConfig, DFlashNetwork
from .drafter_dtype import marks_of
from .drafter_eagle_network import EagleConfig, EagleNetwork
from .drafter_falcon_network import FalconConfig, FalconNetwork
from .drafter_foreign_network import ForeignNetwork
from .drafter_parallelspec_network import ParallelSpecConfig, ParallelSpecNetwork
from .target_refusals import input_device

KINDS: dict[str, tuple[Any, Any]] = {
    "DFlashDraftModel": (DFlashConfig, DFlashNetwork),
    "DFlashSpeculator": (DFlashConfig, DFlashNetwork),
    "DSparkDraftModel": (DFlashConfig, DFlashNetwork),
    "DSparkSpeculator": (DFlashConfig, DFlashNetwork),
    "MuseGlimmerAssistantModel": (DFlashConfig, DFlashNetwork),
    "Eagle3Speculator": (EagleConfig, EagleNetwork),
    "Eagle3DraftModel": (EagleConfig, EagleNetwork),
    "LlamaForCausalLMEagle3": (EagleConfig, EagleNetwork),
    "Eagle3LlamaForCausalLM": (EagleConfig, EagleNetwork),
    "FalconSpeculator": (FalconConfig, FalconNetwork),
    "PEagleSpeculator": (ParallelSpecConfig, ParallelSpecNetwork),
    "PEagleDraftModel": (ParallelSpecConfig, ParallelSpecNetwork),
}
"""What `architectures` in a drafter's config says, and what that is here."""
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
MOST_BYTES = 2**22
"""Of config.json and an index."""
LEFT_OUT = ("embed_tokens.", "lm_head.", "verifier_", "t2d", "d2t")
"""What checkpoints hold besides, some of it the target's own: of no use where the network has no such part."""
OTHER_NAMES = {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm.", "midlayer.": "layers.0."}
"""Beginnings of names that other classes give the same parts."""

_loaded: WeakKeyDictionary = WeakKeyDictionary()
"""target -> by place, what a call loaded for it, and how the files were then; model of another library -> its network,
and the marks of its weights then."""
_lock = threading.Lock()


def drafting_model(given, target):
    """What `given` means as `assistant_model`: what a folder or Hub id holds, the network of a loaded model of a kind
    that is known here, or else `given` itself.

    Raises:
        ValueError: there is no checkpoint, or it is damaged, or of no kind that is known here.
        OSError: its weights cannot be downloaded.
    """
    if isinstance(given, str | Path):
        place = str(Path(given).resolve()) if Path(given).is_dir() else str(given)
        files = [(file.name, file.stat().st_mtime_ns) for file in sorted(Path(place).glob("*")) if file.is_file()]
        with _lock, torch.inference_mode(False):  # weights of inference mode cannot be packed
            there = _loaded.setdefault(target, {})
            if place not in there or there[place][0] != files:
                there[place] = files, load_drafter(place, target)
            return there[place][1]
    if not isinstance(given, nn.Module) or isinstance(given, ForeignNetwork) or kind_of(architectures(given)) is None:
        return given
    config: Any = given.config
    weights = given.state_dict()
    marks = marks_of(weights.values())
    with _lock:
        if given not in _loaded or _loaded[given][0] != marks:
            where = f"the config of {type(given).__name__}"
            fields = {**config.to_dict(), "architectures": architectures(given)}
            _loaded[given] = marks, network_of(fields, where, weights)
        return _loaded[given][1]


def architectures(model) -> list[str]:
    names = getattr(getattr(model, "config", None), "architectures", None) or []
    return [*names, type(model).__name__]


def kind_of(names: list[str]) -> tuple[Any, Any] | None:
    """The classes of config and network that the first known one of `names` means."""
    return next((KINDS[name] for name in names if name in KINDS), None)


def load_drafter(place: str, target) -> nn.Module:
    """The network of a checkpoint, or the SpecFormer drafter or the causal LM that it is, in the dtype of `target`.

    Raises: see `drafting_model`.
    """
    config = read_config(place)
    if config.get("model_type") == "specformer":
        try:
            return AutoModel.from_pretrained(place)  # known where the package is imported
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{place} could not be loaded ({error}). Pass a SpecFormer drafter loaded: "
                f"assistant_model=AutoModel.from_pretrained({place!r}, trust_remote_code=True)."
            ) from error
    if kind_of(config.get("architectures") or []) is None:
        return load_causal_lm(place, target)
    return load_network(place, config, f"{place}/config.json").to(target.dtype)


def read_config(place: str) -> dict:
    """config.json of a folder or Hub id.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        return read_json(file_of(place, "config.json"), f"{place}/config.json")
    except OSError as error:
        raise ValueError(
            f"{place!r} was given as the drafter, of which no config.json could be read. Pass a folder, a Hub id that "
            "can be reached, or, as assistant_model, the loaded model: AutoModel.from_pretrained(<drafter>, "
            "trust_remote_code=True)."
        ) from error


def load_causal_lm(place: str, target) -> nn.Module:
    """
    Raises:
        ValueError: some of its weights are not in the files, as where it is a drafter of a kind that is not known here.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        place,
        dtype=target.dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are told of below
        output_loading_info=True,
    )
    model, found = loaded
    if wrong := sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"])):
        raise ValueError(
            f"{place} does not hold the weights of a {type(model).__name__}: {', '.join(wrong[:4])} are not there "
            f"or of another shape. Drafters of these kinds are known: {', '.join(KINDS)}."
        )
    return model.to(input_device(target)).eval()


def load_network(place: str, config: dict, where: str) -> ForeignNetwork:
    """The network of a checkpoint of another project, in its own dtype. `where` is what messages call its config.

    Raises: see `drafting_model`.
    """
    try:
        files = weight_files(place)
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, "pt") as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        network = empty_network(config, where, shapes)
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            with safe_open(file, "pt") as weights:
                tensors |= {name: weights.get_tensor(name) for name in weights.keys() if is_needed(name, network)}  # noqa: SIM118
        return filled(network, tensors, place)
    except (AttributeError, IndexError, KeyError, SafetensorError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{place} holds no drafter that could be read ({type(error).__name__}: {error}). Download it again; if it "
            "is of a newer format, this package does not know it yet."
        ) from error


def network_of(config: dict, where: str, tensors: dict[str, torch.Tensor]) -> ForeignNetwork:
    """The network that `config` describes, of these `tensors` themselves."""
    network = empty_network(config, where, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return filled(network, tensors, where)


def empty_network(config: dict, where: str, shapes: dict[str, tuple[int, ...]]) -> ForeignNetwork:
    """The network without weights, on the meta device.

    Raises:
        ValueError: weights of such `shapes` are not its own.
    """
    kind = kind_of(config["architectures"])
    assert kind is not None  # it was looked for before
    parsed = kind[0].from_dict(config, where)
    given = {renamed(name): shape for name, shape in shapes.items()}
    if "fc.weight" in given and len(given["fc.weight"]) == 2:
        parsed.target_hidden_size = given["fc.weight"][1] // parsed.num_states
    with torch.device("meta"):
        network = kind[1](parsed)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - given.keys())]
    problems += [
        f"{name} is {given[name]}, not {shape}" for name, shape in expected.items() if given.get(name, shape) != shape
    ]
    problems += [
        f"{name} is unknown" for name in sorted(given.keys() - expected.keys()) if not name.startswith(LEFT_OUT)
    ]
    if problems:
        raise ValueError(
            f"The weights do not fit {where}: {'; '.join(problems[:8])}. Download the drafter again; if it is of a "
            "newer format, this package does not know it yet."
        )
    return network


def filled(network: ForeignNetwork, tensors: dict[str, torch.Tensor], where: str) -> ForeignNetwork:
    wanted = network.state_dict().keys()
    state = {renamed(name): tensor for name, tensor in tensors.items() if renamed(name) in wanted}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds numbers that are not finite. Download the drafter again.")
    if (offsets := state.get("d2t")) is not None:
        ids = offsets.long() + torch.arange(len(offsets), device=offsets.device)
        if offsets.is_floating_point() or len(ids.unique()) != len(ids) or int(ids.min()) < 0:
            raise ValueError(f"{where}: d2t does not name {len(ids)} different tokens. Download the drafter again.")
        state["d2t"] = offsets.long()
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def renamed(name: str) -> str:
    """A tensor's name as it is here."""
    name = name.removeprefix("model.")
    for theirs, ours in OTHER_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def is_needed(name: str, network: ForeignNetwork) -> bool:
    return renamed(name) in network.state_dict()


def weight_files(place: str) -> list[str]:
    """The safetensors of a checkpoint, on this machine."""
    index = cached_file(place, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [file_of(place, WEIGHTS)]
    names = sorted(set(read_json(index, f"{place}/{INDEX}")["weight_map"].values()))
    if any(not isinstance(name, str) or "/" in name or not name.endswith(".safetensors") for name in names):
        raise ValueError(f"{place}/{INDEX} names files that are no safetensors of that folder: {names[:3]}.")
    return [file_of(place, name) for name in names]


def file_of(place: str, name: str) -> str:
    """
    Raises:
        OSError: it is not there.
    """
    if (found := cached_file(place, name)) is None:
        raise OSError(f"{place} has no {name}.")
    return found


def read_json(path: str, where: str) -> dict:
    if (size := Path(path).stat().st_size) > MOST_BYTES:
        raise ValueError(f"{where} has {size:,} bytes; that of a drafter has no more than {MOST_BYTES:,}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}). Download the drafter again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}; expected an object.")
    return content
