"""The SpecFormer paper's measures (kappa, p, r1, r2, rho, theta) and the acceptance per slot as an `evaluate` metric.

    metric = evaluate.load("scripts/drafting_metric.py")
    metric.compute(tokens=[3, 1], passes=[1, 1], drafted_per_slot=[[1, 1], [1, 1]], accepted_per_slot=[[1, 1], [0, 0]])

It needs no network. `measures.py` defines the measures; scripts that do without `evaluate` call it.
"""

from __future__ import annotations

from itertools import zip_longest

import datasets
import evaluate

# evaluate copies this file elsewhere, and takes along what is imported relatively
from .measures import paper_measures

INPUTS = """
One entry is what was counted over any stretch of decoding: one round of one row, one prompt, one call or a whole run.
Entries are added up. The prompt pass and the token it writes are left out.

Args:
    tokens: tokens added to the texts.
    passes: target passes, one for each row of a batch that was running.
    drafted_per_slot: list, tokens drafted at slot j. Lists may differ in length.
    accepted_per_slot: list, how many of them were accepted.

The `statistics` of one generate() call make the entry

    tokens=sum(statistics.tokens_per_row) - statistics.batch_size, passes=sum(statistics.target_passes_per_row),
    drafted_per_slot=statistics.drafted_per_slot, accepted_per_slot=statistics.accepted_per_slot

compute() also takes the keywords of `paper_measures`: draft_length, and together target_parameters, shared_parameters
and slot_parameters (for p and r1), peak_flops, memory_bandwidth and batch_size (for rho and r2_limit), or
tokens_per_second and plain_tokens_per_second (for theta).

Returns:
    "kappa", "r2", "acceptance_per_slot", and those of "p", "r1", "rho", "r2_limit" and "theta" whose keywords are
    given.
"""

CITATION = """
@misc{shi2025specformer,
    title={Scaling LLM Speculative Decoding: Non-Autoregressive Forecasting in Large-Batch Scenarios},
    author={Luohe Shi and Zuchao Li and Lefei Zhang and Baoyuan Qi and Guoming Liu and Hai Zhao},
    year={2025},
    eprint={2511.20340},
    archivePrefix={arXiv},
}
"""


class DraftingMetric(evaluate.Metric):
    """`paper_measures` of the sums of all entries."""

    def _info(self) -> evaluate.MetricInfo:
        count, per_slot = datasets.Value("int64"), datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                tokens=count, passes=count, drafted_per_slot=per_slot, accepted_per_slot=per_slot
            ),
        )

    def _compute(self, tokens, passes, drafted_per_slot, accepted_per_slot, **keywords):
        per_slot = (
            [sum(counts) for counts in zip_longest(*entries, fillvalue=0)]
            for entries in (drafted_per_slot, accepted_per_slot)
        )
        return paper_measures(sum(tokens), sum(passes), *per_slot, **keywords)
