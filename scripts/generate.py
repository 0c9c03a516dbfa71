"""Answer many prompts: the texts of plain generate(), drafted, in a batch whose rows are refilled.

    specformer generate --prompts prompts.jsonl --target <your model> --drafter my-drafter --output answers
    accelerate launch -m specformer.scripts.generate --prompts <datasets id> --target <your model> --output answers

A row of --prompts is a text or a conversation, in one of the forms that prompt_rows.py lists. --output becomes a folder
of JSON lines: id, the prompt's place among --prompts; text; prompt_ids, response_ids and finished, whether the answer
ended by itself. `datasets` reads it, and so do `specformer train` and `specformer store`. Each process of several
answers its own prompts. Run the same command again after an interruption, with as many processes as you like, and
with another drafter if you like: answers that are there are kept, and those that are missing are made. An answer
depends on its prompt, the settings and --seed alone: it is what plain generate() writes for the prompt alone, in the
target's generation config but for what is an option here; sampled, it is that of acceptance="coupled" with the seed
--seed + id. In half precision, rows beside it can decide a tie.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from time import perf_counter

from accelerate.utils import gather_object

from specformer.generation.backend_linear import fast_linears
from specformer.generation.draft_length import AUTO, checked_draft_length
from specformer.scripts.parts.answer_run import AnswerRun, add_options
from specformer.scripts.parts.answering import Answer
from specformer.scripts.parts.drafted_answering import DraftedAnswering
from specformer.scripts.parts.plain_speed import both_ways, figures_of, in_words

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: argparse.Namespace) -> None:
    run = AnswerRun(arguments)
    target, tokenizer = run.target, run.tokenizer
    settings: dict = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if settings["do_sample"]:
        chosen = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
        settings |= {name: value for name, value in chosen.items() if value is not None}
    config = target.generation_config.to_diff_dict()
    decides = run.settings | {
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "generation_config": {name: value for name, value in config.items() if name != "transformers_version"},
    }
    if target.generation_config.pad_token_id is None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    amounts = {"num_assistant_tokens": arguments.num_assistant_tokens, "tree_size": arguments.tree_size}
    drafter, drafting = arguments.drafter, amounts
    if arguments.prompt_lookup is not None:
        drafter, drafting["prompt_lookup_num_tokens"] = None, arguments.prompt_lookup
    answering = DraftedAnswering(target, arguments.batch_size, settings, drafter, drafting, arguments.seed)

    with run.folder.missing(decides, run.kept) as missing:
        started, tokens = perf_counter(), 0
        answers = answering.run(Answer(index, run.encoded[index]) for index in missing)
        with closing(answers), fast_linears(target):
            written = (with_text(answer, tokenizer) for answer in answers)
            for answer in run.write(written, len(missing)):
                tokens += len(answer.response_ids)
        measured = [{"tokens": tokens, "seconds": perf_counter() - started, "answers": len(missing)}]
    measured[0] |= {"drafted_tokens": answering.tokens, "passes": answering.passes}
    if arguments.measure_plain:
        some = run.kept[:: -(-len(run.kept) // arguments.measure_plain)]
        mine = some[run.process.process_index :: run.process.num_processes]
        measured[0] |= both_ways(answering, [Answer(index, run.encoded[index]) for index in mine])
    measured = gather_object(measured)
    if run.process.is_main_process:
        figures = figures_of(measured)
        run.folder.write_card("specformer.scripts.generate", {**decides, "measured": figures})
        print(f"{len(run.kept)} answers in {arguments.output}. {in_words(figures)}")


def with_text(answer: Answer, tokenizer) -> Answer:
    answer.text = tokenizer.decode(answer.response_ids, skip_special_tokens=True)
    return answer


def length(text: str) -> int | str | None:
    return checked_draft_length(text if text == AUTO else int(text))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--top-p", type=float, help="of sampling; default: as the target's generation config has it")
    parser.add_argument("--top-k", type=int, help="the same; 0: all tokens")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--drafter", default=str(ROOT), help="folder or Hub id, of any kind or a causal LM; default: this checkout's"
    )
    what.add_argument("--prompt-lookup", type=int, help="no model: copy up to so many tokens from the row's own text")
    parser.add_argument(
        "--num-assistant-tokens",
        type=length,
        default=AUTO,
        help='to draft each round; default: "auto", what pays; 0: plain decoding',
    )
    parser.add_argument(
        "--tree-size", type=int, help='to draft each round as a tree; default: what pays, under "auto"; 0: chains'
    )
    parser.add_argument(
        "--measure-plain",
        type=int,
        metavar="PROMPTS",
        help="answer so many of the prompts once more, with plain generate() in batches of --batch-size and drafted, "
        "and compare speed and texts",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
