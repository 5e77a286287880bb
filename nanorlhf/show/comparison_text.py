"""A comparison of two runs as readable text: what compare.py has found, for a terminal.

    A: runs/ppo (PPO, step 40)                                  the two runs
    B: runs/no_kl (PPO, step 40)

      kl_coef  0.05  0.0                                        their settings, A's and B's value

      gold  MEAN +- SE  MEAN +- SE  DIFFERENCE [LOW, HIGH] *    their metrics

    > review the hotel :                                        their answers to the same prompts
    A: the room was ...      B: the pool was ...

Whatever comes from a file goes through terminal.py: it may hold escape codes for the terminal.
"""

import json

from .terminal import in_one_line, printable, side_by_side


def table(comparison: dict, n: int, width: int) -> str:
    """The comparison as readable text, with the answers to n prompts."""
    # Which runs, at which steps. A setting that only one run has may be newer than the other run.
    lines = []
    for side in ("a", "b"):
        run = comparison[side]
        name = in_one_line(run["run"])
        # A config.json is somebody else's text too.
        kind = in_one_line(run["kind"])
        lines.append(f"{side.upper()}: {name} ({kind}, step {run['step']})")
        if run["only_here"]:
            lines.append(f"   only here: {in_one_line(', '.join(run['only_here']))}")
    lines += ["", *lines_of_settings(comparison["settings"], width)]

    # The numbers at these steps. Two runs may have no metric in common, and yet the same prompts.
    if comparison["metrics"]:
        lines += ["", "Mean +- standard error; the difference B - A, its 95% interval in brackets:"]
        for name, row in comparison["metrics"].items():
            lines.append(line_of_metric(name, row))
        lines += note_of_pairs(comparison["metrics"])

    # One metric over the whole course. A course of one step would only repeat the numbers above.
    if len(comparison["course"]) > 1:
        metric = comparison["best"]["metric"]
        lines += ["", f"{metric} at the steps that both have evaluated:"]
        for row in comparison["course"]:
            lines.append(line_of_metric(f"step {row['step']}", row))
    best = comparison["best"]
    if best:
        step_a, step_b = best["steps"]
        lines += ["", f"The highest {best['metric']}: A at step {step_a}, B at step {step_b}"]
        lines.append(line_of_metric("highest", best))
        lines.append("  (chosen by these very answers: the best of many looks better than it is)")
    lines += lines_of_answers(comparison, n, width)
    return "\n".join(lines)


def lines_of_settings(settings: dict[str, list], width: int) -> list[str]:
    """A line for each setting that differs."""
    if not settings:
        return ["No setting differs."]
    lines = ["Settings that differ, A and B:"]
    # A line is "  name  value of A  value of B": six spaces, and the same room for both values.
    longest = max(map(len, settings))
    room = max(10, (width - longest - 6) // 2)
    for name, values in settings.items():
        cells = []
        for value in values:
            text = in_one_line(json.dumps(value, ensure_ascii=False))
            if len(text) > room:
                text = f"{text[: room - 3]}..."
            cells.append(f"{text:{room}s}")
        lines.append(f"  {in_one_line(name):{longest}s}  {'  '.join(cells)}".rstrip())
    return lines


def line_of_metric(name: str, row: dict) -> str:
    """A metric of A and of B, their difference and its interval; * where it is one of pairs."""
    cells = [f"  {in_one_line(name):12s}"]
    for side in ("a", "b"):
        number = row[side]
        cells.append(f"{number['mean']:8.3f} +- {number['se']:.3f}  ")
    low, high = row["interval"]
    cells.append(f"{row['difference']:+8.3f} [{low:+.3f}, {high:+.3f}]")
    if row["pairs"]:
        cells.append("*")
    return " ".join(cells)


def note_of_pairs(metrics: dict[str, dict]) -> list[str]:
    """What * stands for."""
    counts = {row["pairs"] for row in metrics.values() if row["pairs"]}
    if not counts:
        return ["  (the two evaluations are taken for independent)"]
    return [f"  * prompt by prompt, {max(counts)} pairs of answers; the others as if independent"]


def lines_of_answers(comparison: dict, n: int, width: int) -> list[str]:
    """The answers of both runs to n prompts, side by side."""
    rows = comparison["answers"]
    if n == 0:
        return []
    if not rows:
        return ["", "No prompt has an answer of both runs."]
    order = "in the order of the file"
    if comparison["sorted_by"] != "file":
        order = f"the largest differences in {comparison['sorted_by']} first"
    lines = ["", f"Answers to {min(n, len(rows))} of {len(rows)} prompts, {order}:"]
    # The prompt takes the whole width. Below it stand A's answer on the left and B's on the right,
    # each with its scores in its last line.
    for row in rows[:n]:
        cells = []
        for side in ("a", "b"):
            answer = row[side]
            numbers = []
            for name in ("gold", "proxy"):
                if name in answer["numbers"]:
                    number = answer["numbers"][name]
                    numbers.append(f"{name} {number:+.2f}")
            text = printable(answer["response"]) or "(no words)"
            cells.append(f"{side.upper()}: {text}\n{'   '.join(numbers)}")
        lines += ["", side_by_side([f"> {printable(row['prompt'])}"], width)]
        lines.append(side_by_side(cells, width))
    return lines
