"""Draw what the JSON files say.

python -m specformer.scripts.plots runs/drafter/training.json          # training.png next to it
python -m specformer.scripts.plots benchmarks/results/mt_bench_*.json  # acceptance.png next to the first one
python -m specformer.scripts.plots benchmarks/results/benchmark_cpu.json  # benchmark_cpu.png
python -m specformer.scripts.plots switch.json  # of benchmarks.systems --then: switch.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def training_curves(log: dict, path: Path) -> None:
    """Loss and tokens per target pass over the steps of one training run."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    history = log["history"]
    beside = ", and of confidences" if any("eval_confidence_error_slot_0" in entry for entry in history) else ""
    for axes, name, label in (
        (left, "loss", f"training, as its slots are weighed{beside}"),
        (left, "eval_loss", "held out, all slots alike"),
    ):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points, strict=True), label=label)
    left.set(xlabel="optimiser step", ylabel="cross-entropy per slot (nats)", title="Loss")
    left.legend()
    lengths = sorted({name for entry in history for name in entry if name.startswith("eval_tokens_per_pass_k")})
    for name in lengths:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        right.plot(*zip(*points, strict=True), marker="o", label=f"{name.rsplit('k', 1)[1]} drafted a round")
    right.set(xlabel="optimiser step", ylabel="tokens per target pass", title="Held-out answers, greedy")
    right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def acceptance(results: list[dict], path: Path) -> None:
    """Share of rounds in which each draft slot was accepted, the slots before it included."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for result in results:
        regime, shares = result["regime"], result["acceptance_per_slot"]
        label = f"{regime['drafter']}, {regime['decoding']}"
        if regime["decoding"] != "greedy":
            label += f", {regime['acceptance']}"
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
    axes.set(xlabel="draft slot", ylabel="accepted, with all before it", ylim=(0, 1))
    axes.set_xticks(range(1, 1 + max(len(result["acceptance_per_slot"]) for result in results)))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def speeds(result: dict, path: Path) -> None:
    """Speed-up of every contender over plain generate(), by batch size: medians, and bars from the lowest turn to the
    highest."""
    from matplotlib import color_sequences, pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.set_prop_cycle(color=color_sequences["tab20"])  # ten colours are not enough
    contests = result["contests"]
    for name in dict.fromkeys(name for contest in contests for name in contest["contenders"]):
        points = [
            (c["batch_size"], c["contenders"][name]["ratio_to_plain"]) for c in contests if name in c["contenders"]
        ]
        sizes, ratios = zip(*points, strict=True)
        medians = [ratio["median"] for ratio in ratios]
        spread = [
            [ratio["median"] - ratio["min"] for ratio in ratios],
            [ratio["max"] - ratio["median"] for ratio in ratios],
        ]
        axes.errorbar(sizes, medians, yerr=spread, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({contest["batch_size"] for contest in contests}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="rows of the batch", ylabel="times the tokens/s of plain generate()", ylim=(0, None))
    machine, regime = result["machine"], result["regime"]
    place = " ".join(dict.fromkeys([machine["device"], machine.get("cpu", machine["device"])]))
    axes.set_title(f"{regime['target']}, {regime['dtype']}, {contests[0]['decoding']}, {place}", fontsize=10)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def switches(result: dict, path: Path) -> None:
    """Tokens per target pass of a drafter that learns and of one that does not, before and after what it is asked for
    changes: at each batch the mean of five of its domain."""
    from matplotlib import pyplot

    places = {name: turns for name, turns in result["switches"].items() if turns}
    figure, panels = pyplot.subplots(1, len(places), figsize=(7 * len(places), 4), layout="constrained", squeeze=False)
    for axes, (name, turns) in zip(panels[0], places.items(), strict=True):
        for way in ("frozen", "learning"):
            of_way = [turn for turn in turns if turn["way"] == way]
            rates = []
            for turn in of_way:
                near = [each for each in of_way if each["domain"] == turn["domain"]]
                near = [each for each in near if abs(each["batch"] - turn["batch"]) <= 2]
                rates.append(sum(each["tokens"] for each in near) / max(1, sum(each["passes"] for each in near)))
            axes.plot([turn["batch"] + 1 for turn in of_way], rates, label=way)
        if later := [turn["batch"] for turn in turns if turn["domain"] == 1]:
            axes.axvline(min(later) + 0.5, color="grey", linestyle="--", label="other prompts")
        axes.set(xlabel="batch", ylabel="tokens per target pass", title=name)
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(paths: list[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    decoded = []
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "history" in content:
            training_curves(content, path.with_name("training.png"))
            print(path.with_name("training.png"))
        elif "contests" in content:
            speeds(content, path.with_suffix(".png"))
            print(path.with_suffix(".png"))
        elif any(content.get("switches", {}).values()):
            switches(content, path.with_suffix(".png"))
            print(path.with_suffix(".png"))
        elif "acceptance_per_slot" in content:
            decoded.append(content)
        else:
            raise ValueError(
                f"{path} is no training log, and no result of evaluate_drafter's decoding, of benchmark, or of "
                "benchmarks.systems with --then."
            )
    if decoded:
        acceptance(decoded, paths[0].with_name("acceptance.png"))
        print(paths[0].with_name("acceptance.png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    main(parser.parse_args().files)
