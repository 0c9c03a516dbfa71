"""The options of training: the Trainer's and the drafter's, under each of their names, on the command line and in
recipes, and which of them decide about a run."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import EACH_STEP, SMALL, log_of, prepare, run
from transformers import TrainingArguments

from specformer.scripts import distill, evaluate_drafter, reproduce, train
from specformer.scripts.parts.recipes import options_of, read_recipe
from specformer.scripts.parts.training_arguments import UNREAD, DrafterTrainingArguments

PLACES = ("--data", "answers", "--output", "drafter")


def parsed(monkeypatch, *options, module=train):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, options)])
    return module.parse()


def test_defaults(monkeypatch):
    """Those of before, in the Trainer's words."""
    arguments = parsed(monkeypatch, *PLACES)
    assert isinstance(arguments, TrainingArguments)
    expected = dict(data=Path("answers"), output_dir="drafter", num_train_epochs=3, per_device_train_batch_size=8)
    expected.update(per_device_eval_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-3, warmup_steps=0.04)
    expected.update(weight_decay=0.01, adam_beta2=0.95, max_grad_norm=1, bf16=False, fp16=False, seed=0, save_steps=0.1)
    expected.update(lr_scheduler_type="cosine", save_strategy="steps", eval_strategy="no", logging_steps=10)
    expected.update(metric_for_best_model="eval_tokens_per_pass", greater_is_better=True, report_to=[])
    expected.update(remove_unused_columns=False, label_names=["labels"], ddp_find_unused_parameters=False)
    expected.update(num_draft_tokens=None, config=[], slot_decay=1, save_dtype="bfloat16", store_hidden_states=None)
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_fields_of_several_configs_are_not_lost(monkeypatch, capsys):
    arguments = parsed(monkeypatch, *PLACES, "--config", "confidence_head=true", "intermediate_size=8")
    assert arguments.config == ["confidence_head=true", "intermediate_size=8"]
    with pytest.raises(SystemExit):
        parsed(monkeypatch, *PLACES, "--config", "confidence_head=true", "--config", "intermediate_size=8")
    assert "name all fields behind one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        "--epochs 2 --batch-size 4 --accumulation 3 --draft-vocab-size 9 --start-from d --store-hidden-states --bf16",
        "--num-train-epochs 2 --per-device-train-batch-size 4 --gradient-accumulation-steps 3 --draft-vocab-size=9 "
        "--bf16 true --store-hidden-states --start-from d",
        "--num_train_epochs 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 3 --draft_vocab_size 9 "
        "--start_from d --bf16 --store_hidden_states",
    ],
)
def test_every_name_of_an_option(options: str, monkeypatch):
    arguments = parsed(monkeypatch, *PLACES, *shlex.split(options))
    settings = arguments.settings()
    expected = dict(epochs=2, batch_size=4, accumulation=3, draft_vocab_size=9, start_from="d", mixed_precision="bf16")
    assert {name: settings[name] for name in expected} == expected
    assert (arguments.per_device_eval_batch_size, arguments.store_hidden_states) == (4, "")


def test_options_of_the_trainer_alone(monkeypatch):
    """They are taken, and noted as far as they decide about the run."""
    given = ("--adam-epsilon", "1e-7", "--gradient-checkpointing", "--lr-scheduler-type", "linear")
    free = ("--run-name", "mine", "--logging-steps", "3", "--dataloader-num-workers", "2")
    arguments = parsed(monkeypatch, *PLACES, *given, *free)
    assert (arguments.adam_epsilon, arguments.run_name, arguments.dataloader_num_workers) == (1e-7, "mine", 2)
    others = {"adam_epsilon": 1e-7, "gradient_checkpointing": True, "lr_scheduler_type": "linear"}
    assert arguments.settings()["other_arguments"] == others
    assert parsed(monkeypatch, *PLACES).settings()["other_arguments"] is None
    assert DrafterTrainingArguments(data=Path("a"), output_dir="b").settings()["other_arguments"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "answers"], "the following arguments are required: --output-dir"),
        ([*PLACES, "--epoch", "3"], "unrecognized arguments: --epoch 3"),
        ([*PLACES, "--save-steps", "3"], "unrecognized arguments: --save-steps 3"),  # the best one is chosen of ours
        ([*PLACES, "--remove_unused_columns"], "unrecognized arguments: --remove_unused_columns"),
        ([*PLACES, "--save-dtype", "int8"], "invalid choice: 'int8'"),
        ([*PLACES, "--num-draft-tokens", "many"], "invalid int value: 'many'"),
        (["nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    ],
)
def test_what_is_no_option(options: list[str], message: str, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_no_evaluation(monkeypatch):
    with pytest.raises(ValueError, match="--evaluations is 0; at least 1 is needed"):
        parsed(monkeypatch, *PLACES, "--evaluations", "0")


@pytest.mark.parametrize("given", ["--label-smoothing-factor 0.1", "--push_to_hub", "--bf16-full-eval", "--do-eval"])
def test_what_would_change_nothing_is_refused(given: str, monkeypatch):
    """Before anything is read; and all others are asked for by their names, whatever transformers is there."""
    name = given.split()[0].lstrip("-").replace("-", "_")
    with pytest.raises(ValueError, match=f"{name}: expected none of these, which change nothing"):
        parsed(monkeypatch, *PLACES, *given.split())
    known = {each.name for each in dataclasses.fields(TrainingArguments)}
    assert set(UNREAD) <= known


def test_gradient_checkpointing(tmp_path: Path, monkeypatch):
    """Less memory, the same drafter."""
    prepare(tmp_path)
    plain = run(monkeypatch, tmp_path, *EACH_STEP)
    checkpointed = run(monkeypatch, tmp_path, *EACH_STEP, "--gradient-checkpointing", output="checkpointed")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (checkpointed, plain))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight)


# ---- recipes


def test_a_recipe_is_options(tmp_path: Path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    lines = ["data: answers", "output_dir: drafter", "learning_rate: 3e-4", "paper: true", "bf16: false", "seed: null"]
    lines += ["config: [anchor_slot=true, 'hidden_act=\"relu\"']", "lr_scheduler_kwargs: {num_cycles: 0.4}"]
    recipe.write_text(
        "\n".join([*lines, "start_from: one that is good", "store_hidden_states: true"]), encoding="utf-8"
    )
    arguments = parsed(monkeypatch, recipe)
    assert (arguments.data, arguments.learning_rate, arguments.paper, arguments.bf16) == (
        Path("answers"),
        3e-4,
        True,
        False,
    )
    assert (arguments.seed, arguments.start_from) == (0, "one that is good")
    assert arguments.config == ["anchor_slot=true", 'hidden_act="relu"']
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 0.4} and arguments.store_hidden_states == ""
    changed = parsed(monkeypatch, recipe, "--learning_rate", "1", "--paper", "false", "--output", "other")
    assert (changed.learning_rate, changed.paper, changed.output_dir) == (1, False, "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "recipe.yaml: found list; expected lines such as `learning_rate: 1.0e-3`"),
        ("", "found NoneType; expected lines"),
        ("1: 2", "found dict; expected lines"),
        ("a: [", "recipe.yaml is no YAML: while parsing"),
        ("data: a\noutput: b\nlearning_rates: 3", "unrecognized arguments: --learning-rates 3"),
        ("data: a\noutput: b\nlearning_rate: much", "invalid float value: 'much'"),
    ],
)
def test_what_is_no_recipe(text: str, message: str, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, tmp_path / "recipe.yaml")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["default", "gpu"])
def test_recipes_that_come_with_the_package_are_understood(name: str, tmp_path: Path, monkeypatch):
    """Every option of theirs, by the command that it is of."""
    recipe = read_recipe(reproduce.RECIPES / f"{name}.yaml")
    for section, module in {"distill": distill, "evaluate": evaluate_drafter}.items():
        options = ("--prompts", "p", *options_of(recipe[section]), "--output", "o")
        arguments = vars(parsed(monkeypatch, *options, module=module))
        assert {field: arguments[field] for field in recipe[section]} == recipe[section]
    for training in recipe["train"]:
        training.pop("prompts", None)
        arguments = vars(parsed(monkeypatch, *PLACES, *options_of(training)))
        noted = {field: value if value != "" else True for field, value in arguments.items() if field in training}
        assert noted == {
            field: float(value) if field == "learning_rate" else value for field, value in training.items()
        }


@pytest.mark.parametrize(
    "text",
    [
        "distill: {}\ntrain: []\nevaluate: {}",
        "distill: {}\ntrain: {}\nevaluate: {}",
        "distill: {}\ntrain: [1]\nevaluate: {}",
        "distill: {}\ntrain: [{}]",
        "learning_rate: 3",
    ],
)
def test_what_is_no_recipe_of_all_steps(text: str, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    options = ("--prompts", "p", "--output", "o", "--recipe")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, *options, tmp_path / "recipe.yaml", module=reproduce)
    assert "expected options under distill and evaluate, and a list of trainings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed(monkeypatch, *options, "cpu", module=reproduce)
    assert "No such file or directory" in capsys.readouterr().err


# ---- a run


def test_a_run_is_gone_on_with_under_other_names_and_places(tmp_path: Path, monkeypatch):
    """And refused where what decides about it differs; one of before there were the Trainer's options goes on."""
    prepare(tmp_path)
    few = (*SMALL, "--evaluations", "1")
    folder = run(monkeypatch, tmp_path, *few, "--epochs", "1", "--adam-epsilon", "1e-7")
    before = log_of(folder)
    assert before["settings"]["other_arguments"] == {"adam_epsilon": 1e-7}
    (folder / "training.json").unlink()
    run(monkeypatch, tmp_path, *few, "--num_train_epochs", "1", "--adam_epsilon=1e-7", "--run-name", "again")
    assert log_of(folder)["history"] == before["history"]
    with pytest.raises(ValueError, match=r"other_arguments: \{'adam_epsilon': 1e-07\} there, None now"):
        run(monkeypatch, tmp_path, *few, "--epochs", "1")
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    del settings["other_arguments"]
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    run(monkeypatch, tmp_path, *few, "--epochs", "1")


def test_mixed_precision(tmp_path: Path, monkeypatch):
    """Other losses than without, and close to them."""
    prepare(tmp_path)
    few = (*EACH_STEP, "--epochs", "1", "--evaluations", "1")
    runs = [run(monkeypatch, tmp_path, *few, *more, output=f"run{len(more)}") for more in ((), ("--bf16",))]
    ours, theirs = ([entry["loss"] for entry in log_of(each)["history"] if "loss" in entry] for each in runs)
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.05)
    assert [log_of(each)["settings"]["mixed_precision"] for each in runs] == ["no", "bf16"]
