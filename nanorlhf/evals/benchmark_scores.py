"""From a reward model's scores to the numbers of RewardBench 2 and of RM-Bench.

    A answers to a prompt, C correct and I incorrect ones, P prompts of the subset Ties, N rows,
    G groups of rows (subsets, domains)

Leading dimensions [..] are those of several rewards side by side. All results are float64.

Sources: Malik et al. 2025 (2506.01937) with the scoring code of allenai/reward-bench
(rewardbench/utils.py); Liu et al. 2024 (2410.16184) with that of THU-KEG/RM-Bench (README).
"""

import torch
from torch import Tensor

# The weights of the terms of ties_terms() in the score of the subset.
TIES_WEIGHTS = (0.3, 0.3, 0.2, 0.2, 0.01)
# Half of a prompt of that subset: the scores of its correct answers and of its incorrect ones.
Half = tuple[Tensor, Tensor]


def shared_credit(scores: Tensor) -> Tensor:
    """Best of A, where answer 0 is the correct one: RewardBench 2 outside its subset Ties.

        credit = 1[s_0 = max_j s_j] / #{j: s_j = max}

    scores [.., A] -> [..]: 1/m where the correct answer is among m that share the highest score,
    else 0.
    """
    highest = scores.amax(-1, keepdim=True)
    is_highest = scores == highest  # [.., A]
    return is_highest[..., 0].double() / is_highest.sum(-1)


def ties_terms(tied: Half | None = None, reference: Half | None = None) -> tuple[Tensor, Tensor]:
    """One prompt of RewardBench 2's subset Ties: many answers are equally right, and should score
    alike and above all wrong ones.

        gap_t  = min correct - max incorrect        of the tied answers
        spread = max correct - min correct          of the tied answers
        gap_r  = min correct - max incorrect        of the reference prompt, with one right answer
        gap    = min(gap_t, gap_r)
        terms  = 1[gap_t > 0], 1[gap_r > 0], 1[gap_t > spread], 1[gap > spread],
                 tanh(gap / spread - 1)

    tied, reference: scores (correct [.., C], incorrect [.., I]), or None where the data lack that
    half of the prompt -> terms [.., 5], and known [.., 5]: 0 for a term that needs a half that is
    missing, else 1. ValueError: both halves are missing, or fewer than two answers tie.
    Pitfall: the benchmark's file has the two halves as rows of their own, with ids tied:N and
    ref:N.
    """
    if tied is None and reference is None:
        raise ValueError("ties_terms needs the tied answers or the reference")
    if tied is not None and tied[0].shape[-1] < 2:
        raise ValueError("ties_terms needs at least two correct answers that tie")

    # The other half stands in for one that is missing: what comes of it is set to 0 at the end.
    correct, incorrect = tied or reference
    right, wrong = reference or tied
    correct = correct.double()
    right = right.double()

    # A gap above 0 says that all right answers beat all wrong ones; the spread says how unequal the
    # scores of right answers are.
    min_correct = correct.amin(-1)  # [..]
    spread = correct.amax(-1) - min_correct
    gap_t = min_correct - incorrect.double().amax(-1)
    gap_r = right.amin(-1) - wrong.double().amax(-1)
    gap = torch.minimum(gap_t, gap_r)
    hits = torch.stack([gap_t > 0, gap_r > 0, gap_t > spread, gap > spread], -1)  # [.., 4]
    # Where all right answers score alike, gap / 0 is infinite, and tanh makes +-1 of it.
    margin = torch.tanh(gap / spread - 1)  # [..]
    margin = margin.nan_to_num(nan=0.0)  # where gap and spread are both 0
    terms = torch.cat([hits.double(), margin[..., None]], -1)  # [.., 5]

    # Which terms do the given halves say something about?
    has_tied = tied is not None
    has_reference = reference is not None
    has_both = has_tied and has_reference
    known = torch.tensor([has_tied, has_reference, has_both, has_both, has_both])  # [5]
    known = known.double().expand_as(terms)
    return terms * known, known


def ties_score(terms: Tensor, known: Tensor) -> Tensor:
    """The score of the subset Ties: the weighted sum of the means of its five terms.

        score = sum_j weight_j sum_p terms_pj / sum_p known_pj

    The accuracies on the tied answers and on the references weigh 0.3 each, the terms of the margin
    0.2, 0.2 and 0.01. terms, known [P, .., 5] of ties_terms() -> [..]. Pitfall: a perfect model has
    1.01.
    """
    counts = known.sum(0)  # [.., 5]: how many prompts have what the term needs
    means = terms.sum(0) / counts.clamp(min=1)
    weights = torch.tensor(TIES_WEIGHTS, dtype=torch.float64)  # [5]
    return means @ weights


def style_wins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """RM-Bench: which chosen style beats which rejected one; equal scores are no win.

        wins_ij = 1[chosen_i > rejected_j]        i, j: 0 concise, 1 detailed, 2 with markdown too

    chosen, rejected [.., 3] -> [.., 3, 3].
    """
    wins = chosen[..., :, None] > rejected[..., None, :]
    return wins.double()


def hard_normal_easy(wins: Tensor) -> Tensor:
    """RM-Bench's three accuracies of a matrix of styles: [.., 3, 3] -> [.., 3].

        hard = mean over i < j, normal = mean over i = j, easy = mean over i > j

    Above the diagonal the chosen answer has the plainer style, so a model that likes style gets it
    wrong: that is hard.
    """
    i, j = torch.triu_indices(3, 3, offset=1)
    hard = wins[..., i, j].mean(-1)
    normal = wins.diagonal(dim1=-2, dim2=-1).mean(-1)
    easy = wins[..., j, i].mean(-1)
    return torch.stack([hard, normal, easy], -1)


def mean_of_groups(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over groups of each group's mean: a large domain counts no more than a small one.

    values [N, ..], labels [N] of whole numbers -> the mean over groups [..], and the groups' means
    [G, ..] in the order of their labels.
    """
    means = []
    for label in labels.unique():
        members = values[labels == label]
        means.append(members.double().mean(0))
    means = torch.stack(means)  # [G, ..]
    return means.mean(0), means
