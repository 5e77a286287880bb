"""How far a policy's answers are from those that a reward model knows.

It is the Mahalanobis distance of the model's last hidden state, a sign in warning_signs.py.

    N texts that are known, B texts, D hidden
"""

import torch
from torch import Tensor

from .. import pool
from ..errors import require
from ..models import RewardModel, hidden_at_end, load_reward_model, load_shared_tokenizer
from ..packing import pack
from ..rewards import kind_of
from ..runtime.files import read_object, read_rows
from ..tokens import encode

CHUNK = 256  # texts that a reward model reads at a time


class KnownStates:
    """A reward model's hidden states of answers that it can be trusted with, as a Gaussian.

        distance(h) = sqrt((h - mean)' S^-1 (h - mean)),   S = (1 - s) C + s diag(C)

    C is the covariance of the known states: a direction in which they vary little counts for more.
    Lee et al. 2018 (1807.03888), equation 2, with one class. The known states' own mean squared
    distance is about D.

    The shrinkage s makes S invertible. C alone is not where a LayerNorm comes last: what it gives,
    without its gain and bias, adds up to 0, so one direction never varies. Shrinking to the
    diagonal, not to the identity, keeps distances the same when a coordinate changes its unit.
    Pitfall: hidden states vary very little in many directions. A larger s hides these directions,
    and a small N makes them look even smaller than they are.

    hidden [N, D]: the known states. ValueError: fewer than 2, or a coordinate that never varies.
    """

    def __init__(self, hidden: Tensor, shrinkage: float = 1e-4):
        # In float64: the covariance's eigenvalues differ by many orders of magnitude.
        hidden = hidden.double()
        # A coordinate without variance leaves S singular, whatever the shrinkage. In a single text
        # no coordinate varies.
        if (hidden == hidden[:1]).all(0).any():
            raise ValueError("known states need at least 2 texts, and coordinates that all vary")
        # Shrinking makes the entries off the diagonal smaller, and leaves the diagonal as it is.
        covariance = hidden.T.cov()  # [D, D]
        diagonal = covariance.diag().diag()
        shrunk = (1 - shrinkage) * covariance + shrinkage * diagonal
        self.mean = hidden.mean(0)  # [D]
        self.factor = torch.linalg.cholesky(shrunk)  # S = L L'

    def distance(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, D] -> their distances [B], float64."""
        # (h - mean)' S^-1 (h - mean) = |L^-1 (h - mean)|^2
        deviations = (hidden.double() - self.mean).T  # [D, B]
        whitened = torch.linalg.solve_triangular(self.factor, deviations, upper=False)
        return whitened.norm(dim=0)


@torch.no_grad()
def hidden_states(reward_model: RewardModel, rows: list[dict]) -> Tensor:
    """The last hidden state of texts at their last token, which the score is read from: [N, D].

    rows {prompt_ids, response_ids}, as the file of an evaluation has them.
    """
    # Ids are read, not texts: a text that is encoded again may have other tokens than were scored.
    states = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        prompt_ids = [row["prompt_ids"] for row in chunk]
        response_ids = [row["response_ids"] for row in chunk]
        batch = pack(prompt_ids, response_ids)
        output = reward_model.model.base_model(input_ids=batch.ids, use_cache=False)
        states.append(hidden_at_end(output.last_hidden_state, batch))
    return torch.cat(states)


def measure_distances(run: str, pool_file: str, answers_each: int = 64) -> list[float]:
    """The mean distance of the answers of each evaluation of a finished PPO run, from known ones.

    The reward model is the first of the run's own. Known are the first answers of the SFT policy to
    each prompt of a pool of sample_bon.py, `answers_each` of them. InputError: no such run or pool,
    a reward that is no model, or one that has another tokenizer than the policy.
    Pitfall: a prompt that is not known is far away by itself, whatever its answer. So answers to
    other prompts than the pool's are left out.
    """
    fields = {"reward_model": list[str], "max_new_tokens": int, "chat_template": bool | None}
    settings = read_object(f"{run}/config.json", fields, finite=False)
    spec, *_ = settings["reward_model"]
    require(kind_of(spec) == "model", f"{run}: {spec} is no model, and has no hidden states")
    tokenizer = load_shared_tokenizer(run, [spec])
    reward_model = load_reward_model(spec)
    known_rows = read_pool_answers(pool_file, answers_each, tokenizer, settings)
    known = KnownStates(hidden_states(reward_model, known_rows))
    known_prompts = [row["prompt_ids"] for row in known_rows]

    distances = []
    for evaluation in read_evaluations(run):
        rows = [row for row in evaluation if row["prompt_ids"] in known_prompts]
        require(rows, f"{pool_file} has none of the prompts that {run} was evaluated on")
        distance = known.distance(hidden_states(reward_model, rows))
        distances.append(distance.mean().item())
    return distances


def read_evaluations(run: str) -> list[list[dict]]:
    """The answers of each evaluation of a finished run: rows {prompt_ids, response_ids, ...}."""
    evaluations = []
    # metrics.jsonl has a line for each step. Only lines of an evaluation have numbers eval/...
    for record in read_rows(f"{run}/metrics.jsonl", {"step": int}):
        if "eval/kl" in record:
            path = f"{run}/eval/step_{record['step']}.jsonl"
            evaluations.append(read_rows(path, {"prompt_ids": list, "response_ids": list}))
    return evaluations


def read_pool_answers(path: str, answers_each: int, tokenizer, settings: dict) -> list[dict]:
    """The first answers to each prompt of a pool -> rows {prompt_ids, response_ids}.

    settings: those of a PPO run with the pool's --max_new_tokens and --chat_template. A text does
    not have the control tokens that were sampled in its middle.
    """
    texts = []  # rows {prompt, response}
    for row in pool.read(path):
        for response in row["responses"][:answers_each]:
            texts.append({"prompt": row["prompt"], "response": response})
    encoded = encode(tokenizer, texts, ("response",), chat=bool(settings.get("chat_template")))

    rows = []
    for prompt, response in zip(encoded.prompts, encoded.responses["response"], strict=True):
        # A pool holds texts alone, and each has got an EOS. One that was cut off never had it: with
        # it the answer is longer than any that was sampled.
        sampled = response[: settings["max_new_tokens"]]
        rows.append({"prompt_ids": prompt, "response_ids": sampled})
    return rows
