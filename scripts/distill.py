"""Let a target answer prompts: the training data of its drafter.

    specformer distill --prompts prompts.jsonl --output answers
    accelerate launch -m specformer.scripts.distill --prompts <datasets id> --target <your model> --output answers

A row of --prompts is a text or a conversation, in one of the forms that prompt_rows.py lists: {"prompt": "..."},
{"messages": [...]}, ShareGPT's, Alpaca's and others. --output becomes a folder that `datasets` reads: JSON lines of id,
prompt_ids, response_ids and finished (whether the answer ended by itself), and a README.md with where they come from;
with --store-hidden-states also what `train --store-hidden-states` needs, so that it does not read the answers again.
Run the same command again after an interruption, with as many processes as you like: answers that are there are kept,
those that are missing are made. An answer depends on its prompt and the settings alone, not on the batch or the order,
so an interrupted run ends with the same answers.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack, closing

from specformer.configuration_specformer import SpecFormerConfig
from specformer.generation.backend_linear import fast_linears
from specformer.scripts.parts.answer_run import AnswerRun, add_options
from specformer.scripts.parts.answering import Answer, Answering
from specformer.scripts.parts.distilled_states import StatesWriter, begin_states


def main(arguments: argparse.Namespace) -> None:
    run = AnswerRun(arguments)
    target, layer_ids = run.target, None
    if arguments.store_hidden_states:
        layer_ids = list(SpecFormerConfig.from_target_config(target.config).target_layer_ids)

    def prepare() -> None:
        if layer_ids is not None:
            begin_states(arguments.output, target, layer_ids)

    answering = Answering(
        target, arguments.batch_size, arguments.max_new_tokens, arguments.temperature, arguments.seed, layer_ids
    )
    decides = {**run.settings, "generation_config": None}  # of `generate`, whose folder this would go on with
    with run.folder.missing(decides, run.kept, prepare) as missing:
        answers = answering.run(Answer(index, run.encoded[index]) for index in missing)
        with closing(answers), fast_linears(target), ExitStack() as stack:
            if layer_ids is not None:
                size = len(layer_ids) * target.config.get_text_config(decoder=True).hidden_size
                states = stack.enter_context(closing(StatesWriter(run.folder.file, size)))
                answers = map(states.append, answers)
            for _ in run.write(answers, len(missing)):
                pass
    run.process.wait_for_everyone()
    if run.process.is_main_process:
        run.folder.write_card("specformer.scripts.distill", run.settings)
        print(f"{len(run.kept)} answers in {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--store-hidden-states",
        action="store_true",
        help="keep the target's hidden states as well, for `train --store-hidden-states`, which then need not read the "
        "answers again: 2 bytes a value, for a target of width 896 5 kB a token",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
