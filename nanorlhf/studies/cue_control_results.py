"""What the study of control has found: its tables over seeds, and its picture.

An outcome is {metric: number} of a run's evaluation. A table is {row: {column: (mean, half-width of
the 95% interval over seeds)}}.
"""

import numpy as np

from ..stats import t_interval
from .common import with_interval

DENSE = "dense"  # the reward model that is no SARM, and the arm of PPO against it
CONTROLLED = ("indicator", "hinge", "clamp", "density")


def over_seeds(rows, base=None):
    """[{metric: number}], one a seed -> {metric: (mean, half-width of its 95% interval)}.

    base: such rows of the same seeds, which are subtracted seed by seed.
    """
    # A difference is taken within a seed: what its pairs and its cue do to both rows drops out.
    table = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if base:
            values = [value - other[name] for value, other in zip(values, base)]
        table[name] = t_interval(values)
    return table


def control_tables(outcomes):
    """{title: {arm: {metric: (mean, half-width)}}} at the end of PPO.

    Over all seeds; over those that found features, where not all did; and there less the plain
    run's.
    """
    n_seeds = len(outcomes["plain"])
    of_all_seeds = {}
    for arm, rows in outcomes.items():
        if len(rows) == n_seeds:
            of_all_seeds[arm] = over_seeds(list(rows.values()))
    tables = {"at the end": of_all_seeds}

    # Arms can be compared only in the seeds that all of them have.
    shared_seeds = seeds_of_all_arms(outcomes)
    shared = {}
    for arm, rows in outcomes.items():
        shared[arm] = [rows[s] for s in shared_seeds]
    if shared_seeds and len(of_all_seeds) < len(outcomes):
        of_shared_seeds = {}
        for arm, rows in shared.items():
            of_shared_seeds[arm] = over_seeds(rows)
        tables["at the end, seeds with features"] = of_shared_seeds

    less_plain = {}
    for arm, rows in shared.items():
        if arm not in ("before", "plain"):
            less_plain[arm] = over_seeds(rows, shared["plain"])
    # The dense model's own scores are on another scale than the SARM's.
    if DENSE in less_plain:
        less_plain[DENSE].pop("proxy", None)
    tables["less plain, the same seeds"] = less_plain
    return tables


def seeds_of_all_arms(outcomes):
    """The seeds that every arm has: those that found features."""
    seeds_of_arms = [set(rows) for rows in outcomes.values()]
    return set.intersection(*seeds_of_arms)


def print_table(table):
    """Rows of {name: (mean, half-width)} as text; a row may lack columns."""
    columns = {}  # a dictionary keeps their order
    for row in table.values():
        columns |= dict.fromkeys(row)
    # Arms of --features have long names.
    width = 16
    for name in table:
        width = max(width, len(name) + 1)

    head = " " * width
    for column in columns:
        head += f"{column:>18s}"
    print(head)
    for name, row in table.items():
        line = f"{name:{width}s}"
        for column in columns:
            cell = ""
            if column in row:
                cell = with_interval(*row[column])
            line += f"{cell:>18s}"
        print(line)


def draw(figure, outcomes):
    """Gold and the rate of the cue, or what else there is, arm by arm.

    A dot a seed (hollow where no features were found), and a bar at the mean of the filled ones.
    """
    labels = {
        "cue": "share of held-out answers with the cue",
        "gold": "gold reward, held out",
        "proxy": "the reward model's score, held out",
        "kl": "KL to the SFT policy, nats",
    }
    # The first two that were measured: own data have no cue, and may have no gold.
    first_outcome = next(iter(outcomes["before"].values()))
    shown = [metric for metric in labels if metric in first_outcome][:2]
    shared_seeds = seeds_of_all_arms(outcomes)
    figure.set_size_inches(9, 3.6)
    for i, metric in enumerate(shown):
        axis = figure.add_subplot(1, 2, i + 1)
        for y, (arm, rows) in enumerate(outcomes.items()):
            color = color_of(arm)
            # The dots of an arm lie one above the other around y, in the order of the seeds.
            heights = [y]
            if len(rows) > 1:
                heights = np.linspace(y - 0.25, y + 0.25, len(rows))
            shared_values = []
            for height, (s, row) in zip(heights, rows.items()):
                fill = "white"
                if s in shared_seeds:
                    fill = color
                    shared_values.append(row[metric])
                axis.plot(row[metric], height, "o", ms=4, color=color, mfc=fill)
            if shared_values:
                mean = sum(shared_values) / len(shared_values)
                axis.plot([mean, mean], [y - 0.4, y + 0.4], color=color)
        axis.set_yticks(range(len(outcomes)), list(outcomes))
        axis.invert_yaxis()
        axis.set_xlabel(labels[metric])


def color_of(arm):
    """Black before PPO, red without control, blue with it, grey for the controls."""
    # Such as "clamp" of truth_clamp and of named_3_17_clamp.
    kind = arm.rpartition("_")[2]
    if kind == "before":
        return "black"
    if kind in ("plain", DENSE):
        return "C3"
    if kind in CONTROLLED:
        return "C0"
    return "grey"
