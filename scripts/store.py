"""Keep texts where drafters look up how a text goes on: answers of the target, or any other token ids.

    specformer store --data answers --output store
    specformer store --data more.jsonl --output store --add
    specformer store --data answers --output table.safetensors --trigrams

--data is a folder of `specformer distill`, a JSON-lines file of {"prompt_ids": [...], "response_ids": [...]},
{"input_ids": [...]} or [...], or a NumPy file of one dimension. --output becomes a folder for

    specformer.generate(target, specformer.Reader(specformer.AnswerStore("store")), **inputs)

or, with --trigrams, a file of which token follows which two, for

    table = specformer.TrigramTable.load("table.safetensors")
    specformer.generate(target, specformer.TrigramChains(table), **inputs)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specformer.generation.drafter_store import BUILT, AnswerStore
from specformer.scripts.parts.texts import read_texts


def main(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if arguments.add and arguments.trigrams:
        raise ValueError("A table of trigrams is counted from all texts at once: --add is for stores of texts.")
    if not arguments.add and output.exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists; name another one, or --add to what it holds.")
    texts: list[list[int]] = []
    count = 0
    for text in read_texts(arguments.data):
        if arguments.max_tokens and count + len(text) > arguments.max_tokens:
            print(f"Only the first {len(texts)} texts: --max-tokens is {arguments.max_tokens}.")
            break
        texts.append(text)
        count += len(text)
    if not any(len(text) > 2 for text in texts):
        raise ValueError(f"{arguments.data} holds no text of three tokens or more, so there is nothing to keep.")
    if arguments.trigrams:
        keep_trigrams(output, texts)
        return
    store = AnswerStore(output, max_grown_tokens=1)  # which makes the folder
    store.add(texts, BUILT)
    print(f"{len(texts)} texts of {count} tokens in {output}, which holds {store.num_tokens} now.")


def keep_trigrams(output: Path, texts: list[list[int]]) -> None:
    from specformer.generation.drafter_trigrams import TrigramTable

    table = TrigramTable()
    table.count(texts)
    table.save(output)
    print(f"What follows {len(table)} pairs of tokens, of {len(texts)} texts, in {output}.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="answers, or a file of token ids")
    parser.add_argument("--output", type=Path, required=True, help="folder of the store, or file of the trigrams")
    parser.add_argument("--add", action="store_true", help="to what --output holds already")
    parser.add_argument("--trigrams", action="store_true", help="count which token follows which two instead")
    parser.add_argument("--max-tokens", type=int, default=2**28, help="of all texts together; later ones are left out")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
