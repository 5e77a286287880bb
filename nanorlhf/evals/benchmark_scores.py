"""What a reward model's scores are worth on preference pairs, RewardBench 2 and RM-Bench: from scores to numbers.

    A answers to a prompt, C correct and I incorrect ones, P prompts of the Ties subset, G groups of prompts (subsets, domains)

Leading dimensions [..] are those of several rewards side by side. Sources of the last two: Malik et al. 2025 (2506.01937) with the
scoring code of allenai/reward-bench (rewardbench/utils.py), and Liu et al. 2024 (2410.16184) with that of THU-KEG/RM-Bench (README).
"""

import torch

TIES_WEIGHTS = (0.3, 0.3, 0.2, 0.2, 0.01)  # of the terms of ties_terms()


def shared_credit(scores):
    """Best of A, where answer 0 is the correct one: RewardBench 2 outside its Ties subset.

        credit = 1[s_0 = max_j s_j] / #{j: s_j = max}

    scores [.., A] -> [..], float64: 1, 1/m where m answers share the highest score, or 0.
    """
    highest = scores == scores.amax(-1, keepdim=True)  # [.., A]
    return highest[..., 0].double() / highest.sum(-1)


def ties_terms(tied=None, reference=None):
    """RewardBench 2's Ties subset, one prompt: many answers are equally right, and should score alike and above all wrong ones.

        gap_t = min correct - max incorrect,  spread = max correct - min correct      of the tied answers
        gap_r = the same gap of the reference prompt, which has one right answer
        terms = 1[gap_t > 0],  1[gap_r > 0],  1[gap_t > spread],  1[min(gap_t, gap_r) > spread],  tanh(min(gap_t, gap_r) / spread - 1)

    tied, reference: (correct [.., C], incorrect [.., I]), or None where the data lack that half of the prompt -> terms [.., 5] and known
    [.., 5], 0 for terms that need the half that is missing; a margin of 0 / 0 is 0. ValueError: both missing, or fewer than two answers
    that tie. Pitfall: outside this module the halves are rows of their own, with ids tied:N and ref:N.
    """
    if tied is None and reference is None:
        raise ValueError("ties_terms needs the tied answers or the reference")
    if tied is not None and tied[0].shape[-1] < 2:
        raise ValueError("ties_terms needs at least two correct answers that tie")
    (correct, incorrect), (right, wrong) = ([x.double() for x in part or tied or reference] for part in (tied, reference))
    spread = correct.amax(-1) - correct.amin(-1)  # [..]
    gap_t, gap_r = correct.amin(-1) - incorrect.amax(-1), right.amin(-1) - wrong.amax(-1)  # [..]
    gap = torch.minimum(gap_t, gap_r)
    margin = torch.tanh(gap / spread - 1).nan_to_num(nan=0.0)
    terms = torch.stack([(gap_t > 0).double(), (gap_r > 0).double(), (gap_t > spread).double(), (gap > spread).double(), margin], -1)
    both = tied is not None and reference is not None
    known = torch.tensor([tied is not None, reference is not None, both, both, both]).double().expand_as(terms)
    return terms * known, known


def ties_score(terms, known):
    """The score of the Ties subset: .3 tied accuracy + .3 reference accuracy + .2 + .2 + .01 of the three margin terms.

        score = sum_j weight_j sum_p terms_pj / sum_p known_pj

    terms, known [P, .., 5] of ties_terms() -> [..]. Pitfall: a perfect model has 1.01.
    """
    means = terms.sum(0) / known.sum(0).clamp(min=1)  # [.., 5]
    return means @ torch.tensor(TIES_WEIGHTS, dtype=torch.float64)


def style_wins(chosen, rejected):
    """RM-Bench: which chosen style beats which rejected one; wins are strict.

        wins_ij = 1[chosen_i > rejected_j]        i, j: 0 concise, 1 detailed, 2 detailed with markdown

    chosen [.., 3], rejected [.., 3] -> [.., 3, 3], float64.
    """
    return (chosen[..., :, None] > rejected[..., None, :]).double()


def hard_normal_easy(wins):
    """RM-Bench's three accuracies of a 3 x 3 matrix: [.., 3, 3] -> [.., 3].

        hard = mean over i < j, normal = mean over i = j, easy = mean over i > j

    Hard is above the diagonal: the chosen answer has the plainer style, so a model that likes style gets it wrong.
    """
    i, j = torch.triu_indices(3, 3, offset=1)
    return torch.stack([wins[..., i, j].mean(-1), wins.diagonal(dim1=-2, dim2=-1).mean(-1), wins[..., j, i].mean(-1)], -1)


def mean_of_groups(values, labels):
    """The mean over groups of the mean in each, so that a large domain counts no more than a small one.

    values [N, ..], labels [N] of whole numbers -> mean over groups [..], and [G, ..] in the labels' order.
    """
    means = torch.stack([values[labels == g].double().mean(0) for g in labels.unique()])  # [G, ..]
    return means.mean(0), means
