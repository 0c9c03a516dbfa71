"""Files of strangers: nothing of them is run, and what is damaged or hostile ends in a sentence, not in memory or time.

Run as a program, this file is the worker of the fuzz: it loads mutated drafters under limits of memory and time.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import PRESETS, llama, llama_config

from specformer import SpecFormerConfig, SpecFormerModel
from specformer.configuration_specformer import LARGEST, MOST_PARAMETERS

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "model.safetensors"


def save_drafter(folder: Path) -> Path:
    torch.manual_seed(0)
    SpecFormerModel(PRESETS["some tokens"](llama_config())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_drafter(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A drafter's weights and config, to be spoilt."""
    for name in ("config.json", WEIGHTS):
        shutil.copy(saved / name, tmp_path)
    return tmp_path


def refusal(folder: Path, kind: type = ValueError, **arguments) -> str:
    """The sentence with which loading ends."""
    with pytest.raises(kind) as caught:
        SpecFormerModel.from_pretrained(folder, **arguments)
    message = str(caught.value)
    assert len(message.split()) >= 5, message
    return message


def edit_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# ---- pickles


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_the_payload_works(tmp_path: Path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def leave_only(name: str):
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / name)

    return spoil


def sharded(shard: str):
    def spoil(folder: Path) -> None:
        names = ("final_norm.weight", "input_proj.weight")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / WEIGHTS).rename(folder / Path(shard).name)

    return spoil


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", base_model_name_or_path="../other")))
    shutil.copy(folder / WEIGHTS, folder / "adapter_model.bin")


PICKLES = {
    "instead of safetensors": (leave_only("pytorch_model.bin"), OSError, "safetensors"),
    "under the name of safetensors": (lambda folder: None, ValueError, "no drafter's has more than"),
    "as a shard": (sharded("shard.bin"), ValueError, "not safetensors next to it"),
    "as a shard elsewhere": (sharded("../shard.safetensors"), ValueError, "not safetensors next to it"),
    "as an adapter": (adapter, ValueError, "no adapters"),
    "as transformers_weights": (
        lambda folder: edit_config(folder, transformers_weights="adapter_model.bin"),
        ValueError,
        "no field 'transformers_weights'",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_no_pickle_is_loaded(case: str, folder: Path):
    spoil, kind, part = PICKLES[case]
    mark = folder / "ran"
    (folder / WEIGHTS).write_bytes(pickle.dumps(Payload(mark)))
    spoil(folder)
    assert part in refusal(folder, kind)
    assert not mark.exists()


def test_no_pickle_is_asked_for(folder: Path):
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickles" in refusal(folder, use_safetensors=False)
    assert "is a file; give the folder" in refusal(folder / "pytorch_model.bin")
    SpecFormerModel.from_pretrained(folder)  # beside safetensors it is not read
    (folder / WEIGHTS).unlink()
    assert "safetensors" in refusal(folder, OSError)


def test_shards_load(saved: Path, tmp_path: Path):
    drafter = SpecFormerModel.from_pretrained(saved)
    drafter.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / WEIGHTS).exists()
    loaded = SpecFormerModel.from_pretrained(tmp_path)
    assert all(torch.equal(weight, drafter.state_dict()[name]) for name, weight in loaded.state_dict().items())
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "names no shards" in refusal(tmp_path)


# ---- damaged checkpoints


def read_weights(folder: Path) -> tuple[dict, bytes]:
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_weights(folder: Path, header, tensors: bytes, size: int | None = None) -> None:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + tensors)


def change_tensor(folder: Path, name: str, **fields) -> None:
    header, tensors = read_weights(folder)
    header[name].update(fields)
    write_weights(folder, header, tensors)


def cut(share: float):
    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(share * len(data))])

    return spoil


def header_as(make, size: int | None = None):
    return lambda folder: write_weights(folder, make(read_weights(folder)[0]), read_weights(folder)[1], size)


def set_draft_tokens(*ids: int):
    def spoil(folder: Path) -> None:
        header, tensors = read_weights(folder)
        first, last = header["draft_token_ids"]["data_offsets"]
        count = (last - first) // 8
        numbers = (list(ids) * count)[:count]
        write_weights(folder, header, tensors[:first] + struct.pack(f"<{count}q", *numbers) + tensors[last:])

    return spoil


DAMAGE = {
    **{f"cut at {share}": cut(share) for share in (0, 0.0001, 0.01, 0.5, 0.99999)},
    "huge header": header_as(lambda header: header, size=2**63),
    "header of four gigabytes": header_as(lambda header: header, size=2**32),
    "no JSON": header_as(lambda header: b"{" * 100),
    "no UTF-8": header_as(lambda header: b"\xff" * 100),
    "a list": header_as(lambda header: [header]),
    "deep": header_as(lambda header: b"[" * 100_000),
    "empty": header_as(lambda header: {}),
    "lacks one": header_as(lambda header: {name: header[name] for name in list(header)[:-1]}),
    "unknown dtype": lambda folder: change_tensor(folder, "final_norm.weight", dtype="X9"),
    "smaller dtype": lambda folder: change_tensor(folder, "final_norm.weight", dtype="I8"),
    "other shape": lambda folder: change_tensor(folder, "final_norm.weight", shape=[4, 8]),
    "huge shape": lambda folder: change_tensor(folder, "final_norm.weight", shape=[2**40, 2**40]),
    "negative shape": lambda folder: change_tensor(folder, "final_norm.weight", shape=[-32]),
    "overlap": lambda folder: change_tensor(folder, "final_norm.weight", data_offsets=[0, 128]),
    "backwards": lambda folder: change_tensor(folder, "final_norm.weight", data_offsets=[128, 0]),
    "beyond": lambda folder: change_tensor(folder, "final_norm.weight", data_offsets=[0, 2**60]),
    "more bytes": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0" * 100),
    "renamed": header_as(lambda header: {name.replace("final_norm", "other"): at for name, at in header.items()}),
    "draft tokens beyond": set_draft_tokens(*range(100, 200)),
    "draft tokens negative": set_draft_tokens(*range(-5, 50)),
    "draft tokens twice": set_draft_tokens(1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights(case: str, folder: Path):
    SpecFormerModel.from_pretrained(folder)
    DAMAGE[case](folder)
    message = refusal(folder)
    assert "save" in message, message
    assert str(folder) in message


def test_weights_of_another_size(folder: Path):
    """Refused before memory is taken for what the config claims."""
    edit_config(folder, intermediate_size=2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(folder)
    assert "{'other_shapes': ['draft_mlp.down_proj.weight: [32, 64], not [32, 16777216]', 'draft_mlp.gate_p" in message
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 2**20  # KiB; the weights would be six times that


def test_long_files_are_not_read(folder: Path):
    """A config, a header or an index of millions of entries would take minutes and gigabytes."""
    more = {f"x{number}": {} for number in range(30_000)}
    edit_config(folder, a="x" * 2**15)
    SpecFormerModel.from_pretrained(folder)
    config = (folder / "config.json").read_text()
    edit_config(folder, **more)
    assert "config.json has " in refusal(folder)
    (folder / "config.json").write_text(config)
    header, tensors = read_weights(folder)
    nothing = dict(dtype="F32", shape=[0], data_offsets=[len(tensors)] * 2)
    write_weights(folder, {**header, **dict.fromkeys(more, nothing)}, tensors)
    assert "bytes, and no drafter's has more than 262,144: it is damaged" in refusal(folder)
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(more, "a.safetensors")})
    )
    assert "index.json has " in refusal(folder)


@pytest.mark.parametrize("names", [[f"x{number}" for number in range(2000)], ["x" * 200_000]], ids=["many", "long"])
def test_messages_about_weights_are_short(names: list[str], folder: Path):
    header, tensors = read_weights(folder)
    nothing = dict(dtype="F32", shape=[0], data_offsets=[len(tensors)] * 2)
    write_weights(folder, {**header, **dict.fromkeys(names, nothing)}, tensors)
    message = refusal(folder)
    assert "unexpected_keys" in message
    assert len(message) < 2000
    assert ("and 1980 more" in message) == (len(names) > 1)


def test_an_index_without_shards(folder: Path):
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}, "metadata": {}}')
    assert "names no shards" in refusal(folder)


def loop(file: Path) -> None:
    file.symlink_to(file)


@pytest.mark.parametrize("kind", [loop, os.mkfifo, Path.mkdir, lambda file: file.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_what_is_no_file(name: str, kind, folder: Path):
    """Nothing is read of it: reading a pipe or /dev/zero would never end."""
    (folder / name).unlink()
    kind(folder / name)
    assert name in refusal(folder, OSError)


def test_an_extra_weight(folder: Path):
    header, tensors = read_weights(folder)
    header["extra.weight"] = dict(dtype="F32", shape=[1], data_offsets=[len(tensors), len(tensors) + 4])
    write_weights(folder, header, tensors + b"\0" * 4)
    assert "unexpected_keys" in refusal(folder)


# ---- hostile configs

NAN, HUGE = float("nan"), 10**12
HOSTILE = [
    *({name: value} for name in ("hidden_size", "vocab_size", "num_draft_tokens") for value in (10**9, HUGE, -1, 0)),
    *({name: value} for name in ("intermediate_size", "head_dim") for value in ("8", 2.0, NAN, True, [8], {"a": 1})),
    *({name: "8"} for name in ("hidden_size", "num_attention_heads", "target_num_hidden_layers", "draft_vocab_size")),
    *({"previous_token_rank": value} for value in (HUGE, -1, 0, "8", 2.0, True, [8])),
    *({"num_candidates": value} for value in (LARGEST, 1025, -1, 0, "8", 2.0, True, None, NAN)),
    *({"num_draft_layers": value} for value in (LARGEST, 65, -1, 0, "2", 2.0, True, None)),
    {"confidence_head": 1},
    {"previous_token_rank": LARGEST, "hidden_size": 2**16, "head_dim": 64},
    {"hidden_size": None},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"target_num_hidden_layers": HUGE},
    {"draft_vocab_size": HUGE},
    {"default_num_assistant_tokens": HUGE},
    {"default_num_assistant_tokens": -1},
    *({"target_layer_ids": value} for value in ([31], [-1], [2, 1], [True], "34", {"a": 1}, [], [NAN], 4)),
    *({"rope_theta": value} for value in (0, -1.0, "10000", NAN, float("inf"), True, None, 10**400)),
    *({"rms_norm_eps": value} for value in (-1e-5, NAN, "x", 2, None)),
    *({"initializer_range": value} for value in (-1.0, NAN, float("inf"), "x", None)),
    *({"hidden_act": value} for value in ("../../silu.py", "/etc/passwd", "no_such", None, 3, ["silu"], "")),
    *({name: value} for name in ("use_anchor_token", "anchor_slot") for value in (1, "true", None, [])),
    {"draft_attends_context": 1},
    *({"target_name_or_path": value} for value in (3, ["x"], "a\nlicense: other", "a\0b", "x" * 10**6)),
    *({"dtype": value} for value in ("no_such", "load", "int8", "../float32", 7, ["float32"])),
    {"torch_dtype": "load"},
    *({"auto_map": {"AutoModel": value}} for value in ("../evil.Model", "/tmp/evil.Model", "..--a.B", "a", 3, None)),
    {"auto_map": "modeling_specformer.SpecFormerModel"},
    {"attn_implementation": "someone/kernels"},
    {"experts_implementation": "someone/kernels"},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"transformers_weights": "../../other.safetensors"},
    {"attribute_map": {"hidden_size": "evil"}, "evil": 10**9},
    {"num_labels": 10**9},
    {"id2label": 5},
    {"fusion_config": {"a": 1}},
    {"per_layer_config": [1]},
    {"__class__": 5},
    {"to_dict": 5},
    {"get_text_config": None},
    {"num_attention_heads": LARGEST, "head_dim": 2**20},
]


@pytest.mark.parametrize("fields", HOSTILE, ids=lambda fields: str(fields)[:60])
def test_hostile_config(fields: dict):
    with pytest.raises(ValueError) as caught:
        SpecFormerConfig(**fields)
    message = str(caught.value)
    assert 5 <= len(message.split()) < 100, message
    assert "SpecFormerConfig" in message
    assert next(iter(fields)) in message or "parameters" in message or "transformers cannot use" in message


def test_hostile_config_in_a_file(folder: Path):
    edit_config(folder, hidden_size=10**9)
    assert "hidden_size is 1000000000; expected a positive integer" in refusal(folder)
    for text in ("", "{", "[]", "3", "null", '"x"', '{"hidden_size": ' + "9" * 5000 + "}", "\0"):
        (folder / "config.json").write_text(text)
        with pytest.raises((ValueError, OSError)) as caught:
            SpecFormerModel.from_pretrained(folder)
        assert len(str(caught.value).split()) >= 5
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder, OSError)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_counted(preset: str):
    """What is refused above a limit is the number of parameters that the network has."""
    config = PRESETS[preset](llama_config(), num_draft_tokens=3, num_key_value_heads=1, head_dim=6)
    assert config.num_parameters == sum(parameter.numel() for parameter in SpecFormerModel(config).parameters())
    with pytest.raises(ValueError, match=f"more than {MOST_PARAMETERS:,} are refused"):
        PRESETS[preset](llama_config(), intermediate_size=2**24, hidden_size=2**16)


def test_honest_configs_pass():
    target = llama().config
    for preset in PRESETS.values():
        config = preset(target)
        assert SpecFormerConfig(**config.to_dict()).to_dict() == config.to_dict()
    for fields in (
        dict(dtype="bfloat16"),
        dict(dtype=torch.float16),
        dict(attn_implementation="sdpa"),
        dict(target_name_or_path="/some/folder of mine/target"),
        dict(auto_map={"AutoModel": "someone/drafter--modeling_specformer.SpecFormerModel"}),
        dict(rope_theta=1_000_000),
        dict(a_field_of_newer_transformers={"a": [1]}),
        dict(hidden_size=16384, intermediate_size=53248, num_attention_heads=128, num_key_value_heads=8, head_dim=128),
    ):
        SpecFormerConfig(**fields)


# ---- what one asks for, and nothing else

WATCHED = """
import json, os, sys, threading

events = []

def watch(name, arguments):
    if name in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen",
                "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir"):
        events.append((name, str(arguments[0]) + " " + str(arguments[1] if name.startswith("socket") else "")))
    elif name == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        written = any(sign in (mode or "") for sign in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        events.append(("write" if written else "read", os.path.abspath(os.fsdecode(path))))

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM
import specformer.modeling_specformer, specformer.generation.generate

folder, target_folder = sys.argv[1:]
sys.addaudithook(watch)
before = set(sys.modules)
target = AutoModelForCausalLM.from_pretrained(target_folder)
ids = torch.arange(6, 12)[None]
events.clear()

drafter = specformer.SpecFormerModel.from_pretrained(folder)
specformer.generate(target, drafter, ids, max_new_tokens=6)
drafter = AutoModel.from_pretrained(folder, trust_remote_code=True)
target.generate(ids, assistant_model=drafter, custom_generate=folder, trust_remote_code=True, max_new_tokens=6)

seen, loaded = list(events), sorted({name.split(".")[0] for name in set(sys.modules) - before})
events.clear()

# the control: all of this is seen
import socket, subprocess
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
subprocess.run(["true"])
os.system("true")
open("stray", "w").close()
print(json.dumps(dict(seen=seen, loaded=loaded, control=list(events))))
"""


def test_nothing_is_sent_written_or_run(saved: Path, tmp_path: Path):
    target = llama(torch.float32)
    target.save_pretrained(tmp_path / "target")
    drafter = tmp_path / "drafter"
    shutil.copytree(saved, drafter)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    edit_config(drafter, target_name_or_path="../secret")  # a name, which is never opened
    (tmp_path / "cwd").mkdir()
    (tmp_path / "tmp").mkdir()
    environment = dict(
        os.environ,
        HF_HOME=str(tmp_path / "hub"),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
        HOME=str(tmp_path / "home"),
        TMPDIR=str(tmp_path / "tmp"),
        PYTHONDONTWRITEBYTECODE="1",
    )
    environment.pop("HF_HUB_OFFLINE", None)  # nothing but the code keeps it from the network
    inside = {path: path.stat().st_mtime_ns for path in drafter.rglob("*")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(drafter), str(tmp_path / "target")],
        cwd=tmp_path / "cwd",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    seen = [(name, detail) for name, detail in report["seen"]]
    allowed = (*(str(tmp_path / name) for name in ("hub", "modules", "tmp")), "/dev/null")
    changes = ("write", "os.remove", "os.rename", "os.mkdir")
    wrong = [(name, detail) for name, detail in seen if name not in ("read", *changes)]
    wrong += [(name, detail) for name, detail in seen if name in changes and not detail.startswith(allowed)]
    assert not wrong
    assert any(name == "write" and "modules" in detail for name, detail in seen)  # the remote code's copy
    assert ("read", str(drafter / "config.json")) in seen
    assert ("read", str(secret)) not in seen
    unexpected = set(report["loaded"]) - set(sys.stdlib_module_names) - EXPECTED
    assert not unexpected
    assert {path: path.stat().st_mtime_ns for path in drafter.rglob("*")} == inside
    assert sorted(path.name for path in (tmp_path / "cwd").iterdir()) == ["stray"]
    kinds = {name for name, _ in report["control"]}
    assert {"socket.connect", "subprocess.Popen", "os.system", "write"} <= kinds


EXPECTED = {
    "accelerate",
    "huggingface_hub",
    "numpy",
    "peft",
    "safetensors",
    "specformer",
    "torch",
    "transformers",
    "transformers_modules",
}
"""Packages that transformers and this one import while they load and generate."""


# ---- fuzz

VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 16, 10**9, HUGE, 10**30, 0.5, -0.5, NAN, float("inf"), 1e300]
VALUES += ["", "8", "silu", "../x", "a\0", "x" * 10_000, "float32", "no_such", "/etc/passwd"]
VALUES += [[], [1], [0, 4], [4, 0], [[]], ["x"], [HUGE] * 100, {}, {"a": 1}, {"": None}, {"AutoModel": "../a.B"}]
STRANGE = ["attribute_map", "num_labels", "id2label", "quantization_config", "transformers_weights", "__dict__"]
STRANGE += ["torch_dtype", "attn_implementation", "per_layer_config", "rope_scaling", "_name_or_path", "is_decoder", ""]
STRANGE += ["output_attentions", "name_or_path", "problem_type", "layer_types", "sub_configs", "use_cache", "label2id"]


def spoil_config(folder: Path, chance: random.Random) -> str:
    config = json.loads((folder / "config.json").read_text())
    names = sorted({*config, *SpecFormerConfig().to_dict(), *STRANGE})
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        name = chance.choice(names)
        if chance.random() < 0.1:
            config.pop(name, None)
        else:
            config[name] = chance.choice(VALUES)
    text = json.dumps(config)
    if chance.random() < 0.1:
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice('{}[]",:0\0\ud7ff') * chance.choice((0, 1, 2000)) + text[place + 1 :]
    (folder / "config.json").write_text(text)
    return f"config {text[:3000]}"


def spoil_weights(folder: Path, chance: random.Random) -> str:
    header, tensors = read_weights(folder)
    name = chance.choice(sorted(header.keys() - {"__metadata__"}))
    numbers = [-1, 0, 1, 2, 32, 100, len(tensors), 2**31, 2**40, 2**63, 10**30, 0.5, None, "8"]
    kind = chance.choice(["cut", "flip", "size", "dtype", "shape", "offsets", "lacks", "extra", "text"])
    size = None
    if kind == "dtype":
        header[name]["dtype"] = chance.choice(["F64", "F32", "F16", "I32", "U8", "BOOL", "F8_E4M3", "", None, "X"])
    elif kind in ("shape", "offsets"):
        key = "shape" if kind == "shape" else "data_offsets"
        header[name][key] = [chance.choice(numbers) for _ in range(chance.randrange(4))]
    elif kind == "lacks":
        del header[name]
    elif kind == "extra":
        header[chance.choice(["x", "", "final_norm.weight ", "a" * 10_000])] = header[name]
    elif kind == "size":
        size = chance.choice([0, 1, 7, 100, 2**20, 2**31, 2**32, 2**63, 2**64 - 1])
    write_weights(folder, header, tensors, size)
    data = bytearray((folder / WEIGHTS).read_bytes())
    length = struct.unpack("<Q", data[:8])[0] if size is None else 100
    if kind == "cut":
        data = data[: chance.randrange(len(data))]
    elif kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "text":
        for _ in range(chance.choice((1, 1, 20))):
            data[chance.randrange(8, 8 + length)] = chance.choice(b'{}[]",:09a\0\xff')
    (folder / WEIGHTS).write_bytes(bytes(data))
    return f"weights {kind} {name}"


def work(first: int, last: int, saved: Path) -> None:
    """Load the cases of these seeds, under limits, and print a line before and behind each."""
    torch.set_num_threads(1)
    SpecFormerModel.from_pretrained(saved)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def too_long(*_):
        raise TimeoutError("more than ten seconds of computing")

    signal.signal(signal.SIGPROF, too_long)
    for seed in range(first, last):
        with tempfile.TemporaryDirectory() as name:
            folder, chance = Path(name), random.Random(seed)
            for file in ("config.json", WEIGHTS):
                shutil.copy(saved / file, folder)
            case = chance.choice([spoil_config, spoil_weights])(folder, chance)
            print(json.dumps(dict(seed=seed, case=case)), flush=True)
            signal.setitimer(signal.ITIMER_PROF, 10)
            try:
                drafter = SpecFormerModel.from_pretrained(folder)
                drafter.draft(torch.zeros(1, drafter.config.hidden_size, dtype=drafter.dtype))
                outcome = dict(kind=None)
            except (ValueError, OSError) as error:
                wrong = isinstance(error, TimeoutError)
                outcome = dict(kind="timeout" if wrong else "refused", message=str(error)[:2000])
            except BaseException as error:
                outcome = dict(kind=type(error).__name__, message=str(error)[:2000])
            signal.setitimer(signal.ITIMER_PROF, 0)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(dict(outcome, seed=seed, megabytes=memory)), flush=True)


def run_fuzz(saved: Path, first: int, last: int) -> list[dict]:
    """Outcomes of all cases; fails where the worker crashed, or a case ended in anything but a sentence."""
    command = [sys.executable, __file__, str(first), str(last), str(saved)]
    done = subprocess.run(command, env=dict(os.environ, HF_HUB_OFFLINE="1"), capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert done.returncode == 0, (lines[-1:], done.stderr[-3000:])
    cases = {line["seed"]: line["case"] for line in lines if "case" in line}
    outcomes = [dict(line, case=cases[line["seed"]]) for line in lines if "kind" in line]
    assert len(outcomes) == len(cases) == last - first
    wrong = [outcome for outcome in outcomes if outcome["kind"] not in (None, "refused")]
    wrong += [outcome for outcome in outcomes if outcome["kind"] and len(outcome["message"].split()) < 5]
    assert not wrong, json.dumps(wrong, indent=1)[:6000]
    assert outcomes[-1]["megabytes"] - outcomes[0]["megabytes"] < 500
    return outcomes


def check_variety(outcomes: list[dict]) -> None:
    for kind in ("config", "weights"):
        refused = [outcome["kind"] == "refused" for outcome in outcomes if outcome["case"].startswith(kind)]
        assert 0.2 < sum(refused) / len(refused) < 1


def test_fuzz(saved: Path):
    check_variety(run_fuzz(saved, 0, 100))


@pytest.mark.slow
def test_more_fuzz(saved: Path):
    check_variety(run_fuzz(saved, 100, 1100))


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("fault", "kind"),
    [("while True: pass", "timeout"), ("torch.ones(2**30)", "RuntimeError"), ("raise KeyError('x')", "KeyError")],
)
def test_the_worker_notices(fault: str, kind: str, saved: Path, monkeypatch, capfd):
    """Endless loops, memory and errors of other classes are outcomes of their own."""

    class Faulty:
        @staticmethod
        def from_pretrained(folder):
            if folder != saved:
                exec(fault, {"torch": torch})

    limits = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(sys.modules[__name__], "SpecFormerModel", Faulty)
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds, real=signal.setitimer: real(which, seconds / 10))
    try:
        work(0, 1, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["kind"] == kind


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
