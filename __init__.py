"""SpecFormer: lossless batched speculative decoding inside transformers' `generate()`.

The plan of the house. At the top: the drafter network as a Hub repository, `modeling_specformer` and what it needs.
scripts/ is the command line, benchmarks/ measures, and generation/ decodes, where a file's name begins with its room:

    generate      the entry: what a call does, from top to bottom
    decoding      the loop, on one screen: draft, verify, accept, commit
    call          what a call says: its settings, what is refused, the drafter that it means, its statistics
    drafter       the contract of drafters, and those that are there
    draft_length  how many tokens a round drafts
    accept        which tokens are taken: rules, sampling, processors
    text          what is written, and where rows stop
    proposal      what a drafter proposes
    target        the target's passes, and what is found out about it
    prompt        where the tokens of padded prompts are, and which rows read theirs together
    backend       what belongs to torch, transformers, the machine and the process
    cache         keys and values of rows that have lengths of their own
    ranks         one target in several processes: what the first of them decides, and tells the others
    argument      what a caller passed, in messages

No room imports from one above it. A picture, and the files: docs/house.md.

`AutoConfig` and `AutoModel` load drafters with the code of this package once it is imported, see `registration`.
Names are looked up on first use, and absolutely, so that this file also imports where the folder has another name.
"""

from importlib import import_module

_HOMES = {
    "AnswerStore": "specformer.generation.drafter_store",
    "Drafter": "specformer.generation.drafter",
    "Hierarchy": "specformer.generation.drafter_hierarchy",
    "LayerParallel": "specformer.generation.drafter_layer_parallel",
    "MaskedDiffusion": "specformer.generation.drafter_diffusion",
    "OnlineDistillation": "specformer.generation.drafter_online",
    "PathSearch": "specformer.generation.drafter_paths",
    "Proposal": "specformer.generation.drafter",
    "Reader": "specformer.generation.drafter_reader",
    "Rollouts": "specformer.scripts.parts.rollouts",
    "Round": "specformer.generation.call_rounds",
    "RowRound": "specformer.generation.call_rounds",
    "SpecFormerConfig": "specformer.configuration_specformer",
    "SpecFormerModel": "specformer.modeling_specformer",
    "TrigramChains": "specformer.generation.drafter_chains",
    "TrigramTable": "specformer.generation.drafter_trigrams",
    "generate": "specformer.generation.generate",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'specformer' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


if __name__ == "specformer":  # not where a tool imports this file by its folder
    import_module("specformer.registration").register()
