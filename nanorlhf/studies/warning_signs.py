"""How would one notice that gold has fallen, without gold? Signs that can be read during a run, and
how good they are: how well they tell fallen checkpoints from others, and how early they warn.

    R resamples

A run here is {column: a list with one number an evaluation}: step, gold, and columns such as kl or
variance. The first evaluation is the run's start. A checkpoint is any later evaluation, and it has
fallen where gold is below its start. Gold judges the signs, and no sign reads it.

Runs come as {seed: [runs]}. The runs of a seed share their preferences, so only seeds are
independent: intervals draw whole seeds, and a threshold is tried on a seed that did not set it.
"""

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from ..stats import auc, percentiles, resample

Runs = dict[int, list[dict]]  # {seed: its runs}
NAN = float("nan")


# ------------------------------------------------------------------------------------ the signs


class Sign(NamedTuple):
    """A column of a run, and the direction in which it is a warning: +1 upwards, -1 downwards.

    Its value is taken as it is, not its change since the start, so that one threshold holds for all
    runs: "stop where the KL is above 30 nats".
    """

    column: str
    direction: int

    @property
    def name(self) -> str:
        mark = "+" if self.direction > 0 else "-"
        return f"{self.column} {mark}"


# How long a run has gone on is a sign too, and free: a sign that is no better earns nothing.
STEP = Sign("step", +1)
SIGNS = (
    STEP,
    Sign("kl", +1),
    Sign("variance", +1),
    Sign("distance", +1),
    Sign("proxy", +1),
    Sign("entropy", -1),
    Sign("distinct_2", -1),
    Sign("eos_rate", -1),
    Sign("length", +1),
    Sign("length", -1),
)


# A sign is judged as a classifier: each checkpoint has a score and a label.
class Checkpoint(NamedTuple):
    """A checkpoint as a sign sees it: a higher score is a stronger warning."""

    step: int
    score: float
    has_fallen: bool


def list_checkpoints(sign: Sign, runs: list[dict]) -> list[Checkpoint]:
    """The checkpoints that have the sign's number, one run after another.

    A run without the column has none: a single reward model has no variance, for one.
    """
    checkpoints = []
    # A run is {"step": [0, 5, 10], "gold": [-0.6, 0.1, -0.9], "kl": [0.0, 4.1, 9.8], ...}.
    for run in runs:
        if run.get(sign.column) is None:
            continue
        start = run["gold"][0]
        evaluations = zip(run["step"], run["gold"], run[sign.column], strict=True)
        next(evaluations)  # the start is no checkpoint
        for step, gold, value in evaluations:
            if value is not None:
                checkpoints.append(Checkpoint(step, sign.direction * value, gold < start))
    return checkpoints


# --------------------------------------------------------------- telling fallen checkpoints apart


def measure_auc(sign: Sign, runs: Runs, resamples: int) -> dict:
    """How often a fallen checkpoint has a stronger sign than one that has not fallen.

    -> {"auc", "auc_interval": [low, high], "less_step", "less_step_interval"}. less_step: the AUC
    less that of STEP on the same checkpoints. 0.5 is chance. nan: no checkpoint of one of the two
    kinds; and the intervals of a single seed. A resample without one of the kinds is left out.
    """
    tables = []  # of each seed, a row for each checkpoint: score, step, has_fallen
    for own_runs in runs.values():
        checkpoints = list_checkpoints(sign, own_runs)
        if checkpoints:
            rows = [(c.score, c.step, c.has_fallen) for c in checkpoints]
            tables.append(torch.tensor(rows, dtype=torch.float64))

    # Checkpoints of different runs are compared too, since a sign has one threshold for all runs.
    def measure(seeds: Tensor) -> Tensor:
        """The two numbers of these seeds, places in `tables`."""
        drawn = torch.cat([tables[i] for i in seeds.long().tolist()])
        scores, steps, has_fallen = drawn.T
        if len(has_fallen.unique()) < 2:
            return torch.tensor([NAN, NAN])
        # Gold tends to fall late in a run, so the mere number of steps tells much already. A sign
        # is worth what its AUC has beyond that of the step.
        own_auc = auc(scores, has_fallen)
        return torch.tensor([own_auc, own_auc - auc(steps, has_fallen)])

    # The estimate takes every seed once; its interval comes from seeds drawn with replacement.
    seeds = torch.arange(len(tables))
    estimates = torch.tensor([NAN, NAN])
    if tables:
        estimates = measure(seeds)
    ends = torch.full((2, 2), NAN)  # low and high, of both numbers
    if len(tables) > 1 and estimates.isfinite().all():
        # A seed that has been drawn twice counts twice, with all its checkpoints.
        draws = resample(seeds, measure, resamples)  # [R, 2]
        ends = percentiles(draws[draws.isfinite().all(1)])
    own_auc, less_step = estimates.tolist()
    auc_ends, less_step_ends = ends.T.tolist()
    return {
        "auc": own_auc,
        "auc_interval": auc_ends,
        "less_step": less_step,
        "less_step_interval": less_step_ends,
    }


# ---------------------------------------------------------------------------- warning in advance


def find_fall(run: dict) -> int | None:
    """The first step at which gold is below its start; None where it never is."""
    # The start itself is not below the start, so it needs no exception.
    for step, gold in zip(run["step"], run["gold"], strict=True):
        if gold < run["gold"][0]:
            return step
    return None


def choose_threshold(scores: list[float], rate: float) -> float:
    """The lowest of these scores that at most a share `rate` of them lies above. 0 <= rate < 1"""
    # 40 scores and a rate of 0.05 allow two alarms, so the threshold is the third strongest score.
    # A score that is equal to the threshold sounds no alarm in find_alarm().
    strongest_first = sorted(scores, reverse=True)
    n_alarms = int(rate * len(scores))
    return strongest_first[n_alarms]


def find_alarm(checkpoints: list[Checkpoint], threshold: float) -> float:
    """The first step at which the sign is above the threshold; infinity where it never is."""
    # Checkpoints are in the order of the run: its first alarm would have stopped it.
    for checkpoint in checkpoints:
        if checkpoint.score > threshold:
            return checkpoint.step
    return math.inf


def measure_leads(sign: Sign, runs: Runs, rate: float = 0.05) -> dict:
    """How early a sign warns, at a threshold that the other seeds have set.

        lead = the step of the fall - the step of the first alarm

    The threshold lets at most a share `rate` of the other seeds' checkpoints that have not fallen
    sound an alarm. -> {"lead": the median over runs that fall, "warned": the share of them with an
    alarm before the fall or at it, "falling_runs": their number, "false_alarms": the share of the
    runs that never fall with an alarm, "other_runs": their number}. A run without an alarm has a
    lead of -infinity. nan: no such runs, or no other seed.

    Pitfall: an alarm before the fall is early, and counts as false where the threshold is set. So a
    small rate leaves only short leads to a sign that most runs show before they fall.
    """
    leads = []  # of runs that fall
    alarms = []  # of runs that never fall: whether there was one
    for seed, own_runs in runs.items():
        # A threshold that had seen this seed's runs would be tuned to them.
        # Only checkpoints that have not fallen set it: an alarm at one of them is false.
        good_scores = []
        for other_seed, other_runs in runs.items():
            if other_seed == seed:
                continue
            for checkpoint in list_checkpoints(sign, other_runs):
                if not checkpoint.has_fallen:
                    good_scores.append(checkpoint.score)
        if not good_scores:
            continue

        threshold = choose_threshold(good_scores, rate)

        # Now the seed's own runs, which the threshold has not seen.
        for run in own_runs:
            checkpoints = list_checkpoints(sign, [run])
            if not checkpoints:
                continue
            alarm = find_alarm(checkpoints, threshold)
            fall = find_fall(run)
            # In a run that never falls any alarm is false. In a run that falls an alarm has a lead.
            if fall is None:
                alarms.append(alarm < math.inf)
            else:
                leads.append(fall - alarm)

    return {
        "lead": statistics.median(leads) if leads else NAN,
        "warned": share_of([lead >= 0 for lead in leads]),
        "falling_runs": len(leads),
        "false_alarms": share_of(alarms),
        "other_runs": len(alarms),
    }


def share_of(is_so: list[bool]) -> float:
    """The share of True; nan where there is nothing to count."""
    if not is_so:
        return NAN
    return sum(is_so) / len(is_so)


# ------------------------------------------------------------------------------------ the table


def compare_signs(runs: Runs, signs: tuple[Sign, ...] = SIGNS, resamples: int = 1000) -> dict:
    """The table of signs: {name: what measure_auc() and measure_leads() say}."""
    table = {}
    for sign in signs:
        row = measure_auc(sign, runs, resamples)
        table[sign.name] = row | measure_leads(sign, runs)
    return table


def print_signs(table: dict[str, dict]):
    """A line for each sign. lead: in steps, the median; warned, false alarms: shares of runs."""
    print(
        f"{'':14s}{'AUC':>20s}{'less that of step':>22s}{'lead':>8s}{'warned':>14s}"
        f"{'false alarms':>16s}"
    )
    for name, row in table.items():
        line = f"{name:14s}{with_ends(row['auc'], row['auc_interval']):>20s}"
        line += f"{with_ends(row['less_step'], row['less_step_interval']):>22s}"
        line += f"{lead_as_text(row['lead']):>8s}"
        line += f"{with_count(row['warned'], row['falling_runs']):>14s}"
        line += f"{with_count(row['false_alarms'], row['other_runs']):>16s}"
        print(line)


def with_ends(number: float, ends: list[float]) -> str:
    """'0.71 [0.65, 0.78]'; the number alone where it has no interval."""
    if math.isnan(number):
        return "-"
    low, high = ends
    if math.isnan(low):
        return f"{number:.2f}"
    return f"{number:.2f} [{low:.2f}, {high:.2f}]"


def lead_as_text(lead: float) -> str:
    """'-5' steps; 'none' where half of the runs that fall had no alarm; '-' where no run falls."""
    if math.isnan(lead):
        return "-"
    if math.isinf(lead):
        return "none"
    return f"{lead:.0f}"


def with_count(share: float, count: int) -> str:
    """'0.25 of 8'; '-' of none."""
    if not count:
        return "-"
    return f"{share:.2f} of {count}"
