"""What a PPO step costs against one reward model, against five, and against five averaged into one.

    python tests/bench/members.py --model SFT --one RM --five 'RM_{seed}' --averaged RM_AVERAGED

The three take turns, each turn a short run of train_ppo.py from the same SFT policy. Printed are
medians over all steps: seconds to sample, to score and to update, and seconds of a whole step with
the least and the most of a turn's median. Turns whose folder holds a finished run are only read.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

REPO = Path(__file__).resolve().parents[2]
PARTS = ("seconds_rollout", "seconds_score", "seconds_update")


def run_ppo(policy, rewards, steps, folder):
    """A run without a KL penalty and without evaluations, unless its folder holds one."""
    if (folder / "summary.json").exists():
        return
    command = [sys.executable, REPO / "train_ppo.py", "--model", policy, "--reward_model", rewards]
    command += ["--kl_coef", "0", "--steps", str(steps), "--eval_every", "0"]
    command += ["--output_dir", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read_steps(folder):
    """The seconds of each step's parts: a list of dicts."""
    steps = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        # The line of step 0 has no training in it.
        if "seconds_update" in metrics:
            steps.append({part: metrics[part] for part in PARTS})
    return steps


def describe(turns):
    """Medians of a reward's turns, each a list of steps, as a line of a table."""
    every_step = sum(turns, [])
    text = ""
    for part in PARTS:
        text += f"{median(step[part] for step in every_step):6.3f}  "
    whole = median_step(every_step)
    of_turns = [median_step(steps) for steps in turns]
    return f"{text}{whole:6.3f} [{min(of_turns):.3f} - {max(of_turns):.3f}]"


def median_step(steps):
    """The median of the seconds that a step takes, all of its parts together."""
    return median(sum(step.values()) for step in steps)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the SFT policy")
    for name in ("one", "five", "averaged"):
        parser.add_argument(f"--{name}", required=True, help="as train_ppo.py --reward_model")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/members"))
    args = parser.parse_args()

    turns = {"one": [], "five": [], "averaged": []}
    for i in range(1, args.turns + 1):
        for name, steps_of_turns in turns.items():
            folder = args.output_dir / f"{name}-{i}"
            run_ppo(args.model, getattr(args, name), args.steps, folder)
            steps_of_turns.append(read_steps(folder))

    print("seconds     sample   score  update    step [least - most of a turn]")
    for name, steps_of_turns in turns.items():
        print(f"{name:9s}  {describe(steps_of_turns)}")


if __name__ == "__main__":
    main()
