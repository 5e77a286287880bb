"""Pools: many answers to each prompt, sampled or read from a file, and the scores of any number of rewards. Nothing is done twice.

    P prompts, N answers to a prompt, R response tokens

Answers and scores are kept in cache/, in JSONL files with one line a prompt whose names are digests of what they depend on: the
model's files and the data. So a run that was killed goes on at the prompt it had reached, another list of n scores nothing again,
and scores of a model that has changed since are never read. Each line holds its prompt's index: a
line out of its place is an error.
"""

import os

import torch
from torch.nn.utils.rnn import pad_sequence

from .data import read_hub
from .errors import require
from .models import fingerprint, load_policy
from .packing import Answers, pack
from .rewards import fingerprint_reward, load_reward, reward_names
from .rollout import Parts, roll_out
from .runtime.files import append_lines, digest, drop_cut_line, read_checked_lines, read_file
from .runtime.log import Progress
from .runtime.rng import POOL

CHUNK = 4096  # answers that are scored before their scores are written
LAYOUT = "lines with their index"  # goes into the files' names: older files, without, are not read


# ------------------------------------------------------------------------------------------------------------------------ the cache


class Lines:
    """A JSONL file of the cache that only ever grows. All processes read it, the first one writes.

    fits(i, row): whether row i, the first being 0, can be what was appended there. InputError: one
    that cannot. The folder is locked by its RunFolder: a second writer's lines would come between.
    """

    def __init__(self, folder, key, dist, fits, remedy=""):
        self.path, self.dist = os.path.join(folder, "cache", key + ".jsonl"), dist
        remedy = remedy or f"delete {self.path}, it is made again"
        dist.barrier()  # the first process has written what it was given before: a gold reward may be a member too
        self.rows = dist.together(lambda: read_checked_lines(self.path, fits, remedy))
        dist.barrier()  # all have read before one writes
        if dist.main:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            drop_cut_line(self.path)

    def append(self, rows):
        """Add the next lines."""
        self.rows += rows
        if self.dist.main:
            append_lines(self.path, rows)


def holds_answers(row, index, prompt_ids, N):
    """Whether a row of the cache holds N answers to the prompt of this index, a token list."""
    if not isinstance(row, dict) or row.get("index") != index:
        return False
    if row.get("prompt_ids") != prompt_ids or not isinstance(row.get("prompt"), str):
        return False
    ids = row.get("response_ids")
    if not is_list(row.get("responses"), N, str) or not is_list(ids, N, list):
        return False
    return all(response and is_list(response, len(response), int) for response in ids)


def holds_scores(row, index, N):
    """Whether a row of the cache holds the scores of N answers to the prompt of this index."""
    if not isinstance(row, dict) or row.get("index") != index:
        return False
    return is_list(row.get("scores"), N, float)


def is_list(value, length, kind):
    """Whether a value from JSON is a list of this length, all of one type."""
    return isinstance(value, list) and len(value) == length and all(type(x) is kind for x in value)


# ---------------------------------------------------------------------------------------------------------------------- the answers


def sample(config, tokenizer, prompts, dist):
    """N answers to each prompt (token lists) -> one row a prompt:

        {index, prompt, responses, prompt_ids, response_ids}

    The noise of an answer is keyed by (seed, prompt, answer), in a stream of its own: neither the batch size nor the number of
    processes changes it, and it is not the noise of any evaluation.
    """
    N = config.n_answers
    # The stream is part of the key: a pool that older noise began is not gone on with.
    settings = (N, config.max_new_tokens, config.temperature, config.seed, config.dtype, POOL)
    key = "answers_" + digest(LAYOUT, fingerprint(config.model), prompts, settings)

    def fits(i, row):
        return i < len(prompts) and holds_answers(row, i, prompts[i], N)

    lines = Lines(config.output_dir, key, dist, fits)
    if len(lines.rows) == len(prompts):
        return lines.rows
    policy = load_policy(config.model, value_head=False, device=dist.device)
    parts = Parts(config, dist, tokenizer, policy)
    at_once = max(1, config.batch_size // N)  # prompts
    progress = Progress(dist, "sampling, prompt", len(prompts), len(lines.rows))
    for first in range(len(lines.rows), len(prompts), at_once):
        chunk = range(first, min(first + at_once, len(prompts)))
        pairs = [(i, j) for i in chunk for j in range(N)]
        responses = []
        for k in range(0, len(pairs), config.batch_size):
            responses += sample_batch(parts, prompts, pairs[k : k + config.batch_size])
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        rows = []
        for p, i in enumerate(chunk):
            own = slice(p * N, (p + 1) * N)
            prompt = tokenizer.decode(prompts[i], skip_special_tokens=True)
            row = {"index": i, "prompt": prompt, "responses": texts[own]}
            rows.append({**row, "prompt_ids": prompts[i], "response_ids": responses[own]})
        lines.append(rows)
        progress.step(chunk.stop, "")
    progress.close()
    return lines.rows


def sample_batch(parts, prompts, pairs):
    """Answers (prompt i, answer j) -> their token lists, sampled by all processes together."""
    dist, R = parts.dist, parts.config.max_new_tokens

    def mine():
        own = [pairs[k] for k in dist.part(len(pairs))]
        if not own:  # fewer answers than processes
            return torch.zeros(0, R, dtype=torch.long, device=dist.device), torch.zeros(0, dtype=torch.long, device=dist.device)
        rollout, _ = roll_out(parts, [prompts[i] for i, _ in own], [i * 2**32 + j for i, j in own], 0, POOL)
        return rollout.response_ids, rollout.response_mask.sum(1)

    ids, lengths = (dist.gather(x).tolist() for x in dist.together(mine))
    return [row[:length] for row, length in zip(ids, lengths)]


def read(spec):
    """A pool that is there already -> rows {prompt, responses[, gold_scores]}; a bad row is an InputError with its place.

    spec: a .json or .jsonl[.gz] file with {prompt, responses: [str], gold_scores: [float]}, or a data set; also with the columns
    {instruction, input, answers, gold_scores}. gold_scores may be missing, then from all rows.
    """
    is_file = spec.removesuffix(".gz").endswith((".json", ".jsonl")) or os.path.isfile(spec)
    rows = []
    for place, row in read_file(spec) if is_file else read_hub(spec):
        require(isinstance(row, dict), f"{place}: a row must be an object with prompt and responses")
        if "prompt" not in row and "instruction" in row:
            parts = [row["instruction"], row.get("input") or ""]
            require(all(isinstance(x, str) for x in parts), f"{place}: instruction and input must be strings")
            row = {**row, "prompt": "\n".join(x for x in parts if x), "responses": row.get("answers", row.get("responses"))}
        responses, gold = row.get("responses"), row.get("gold_scores")
        require(isinstance(row.get("prompt"), str), f"{place}: field 'prompt' must be a string")
        good = isinstance(responses, list) and responses and all(isinstance(x, str) for x in responses)
        require(good, f"{place}: field 'responses' must be a list of at least one string")
        new = {"prompt": row["prompt"], "responses": responses}
        if gold is not None:
            numbers = isinstance(gold, list) and all(type(x) in (int, float) and abs(x) < 1e38 for x in gold)
            require(numbers, f"{place}: field 'gold_scores' must be a list of finite numbers")
            require(len(gold) == len(responses), f"{place}: {len(gold)} gold_scores for {len(responses)} responses")
            new["gold_scores"] = gold
        require(not rows or ("gold_scores" in new) == ("gold_scores" in rows[0]), f"{place}: some rows have gold_scores, and some have not")
        rows.append(new)
    require(rows, f"{spec}: no rows")
    return rows


# ----------------------------------------------------------------------------------------------------------------------- the scores


def score(rows, specs, tokenizer, config, dist):
    """Scores of all answers by each reward of `specs`: {name: [[N floats] for each prompt]}.

    The answers of a chunk are tokenized and sorted by length once, for all members of an ensemble. A reward whose scores are all
    there is not even loaded.
    """
    names = dict(zip(reward_names(specs), specs))
    data = digest([digest(row["prompt"], row["responses"], row.get("response_ids")) for row in rows])

    def fits(i, row):
        return i < len(rows) and holds_scores(row, i, len(rows[i]["responses"]))

    # The scores of each reward; copies of a model share one file.
    files, lines = {}, {}
    for name, spec in names.items():
        key = "scores_" + digest(LAYOUT, fingerprint_reward(spec), data)
        if key not in files:
            files[key] = Lines(config.output_dir, key, dist, fits)
        lines[name] = files[key]
    unfinished = [spec for name, spec in names.items() if len(lines[name].rows) < len(rows)]
    rewards = {spec: load_reward(spec, tokenizer, dist, config.micro_batch_size) for spec in unfinished}
    progress, first = Progress(dist, "scoring, prompt", len(rows)), 0
    while first < len(rows):
        last, count = first, 0
        while last < len(rows) and count < CHUNK:
            count += len(rows[last]["responses"])
            last += 1
        missing = [name for name in names if len(lines[name].rows) < last]
        if missing:
            chunk = [(row, j) for row in rows[first:last] for j in range(len(row["responses"]))]
            answers = answers_of([chunk[k] for k in dist.part(len(chunk))])
            for name in missing:
                scores = iter(score_chunk(rewards[names[name]], answers, dist))
                by_prompt = []
                for i in range(first, last):
                    own = [next(scores) for _ in rows[i]["responses"]]
                    by_prompt.append({"index": i, "scores": own})
                lines[name].append(by_prompt[len(lines[name].rows) - first :])
            progress.step(last, f"{len(missing)} reward(s)")
        first = last
    progress.close()
    return {name: [row["scores"] for row in lines[name].rows] for name in names}


def score_chunk(reward, answers, dist):
    """This process's answers -> the scores of all processes' answers, in order."""
    return dist.gather(dist.together(lambda: reward(answers) if len(answers) else torch.zeros(0))).tolist()


def answers_of(chunk):
    """[(row, j)] -> Answers, by the sampled ids where the rows have them."""
    batch = None
    if chunk and "response_ids" in chunk[0][0]:
        batch = pack([row["prompt_ids"] for row, _ in chunk], [row["response_ids"][j] for row, j in chunk])
    return Answers([row["prompt"] for row, _ in chunk], [row["responses"][j] for row, j in chunk], batch)


def matrix(rows):
    """Lists of N numbers for each prompt, N may differ -> float64 [P, max N] with 0 in the padding, mask [P, max N] bool."""
    scores = [torch.tensor(row, dtype=torch.float64) for row in rows]
    is_answer = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return pad_sequence(scores, batch_first=True), pad_sequence(is_answer, batch_first=True)
