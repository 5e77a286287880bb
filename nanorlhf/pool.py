"""Pools: many answers to each prompt, sampled or read from a file, and their scores by any number
of rewards.

    P prompts, N answers to a prompt, R response tokens

Nothing is done twice. Answers and scores are kept in cache/, in JSONL files with one line a prompt.
The names of the files are digests of what they depend on: the model's files and the data. So a run
that was killed goes on at the prompt it had reached, best-of-n for other n scores nothing again,
and scores of a model that has changed since are never read. Each line holds its prompt's index: a
line out of its place is an error.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .chats import is_chat, read_prompt
from .data import columns_for_files, own_row
from .errors import require
from .models import fingerprint, load_policy
from .packing import Answers, pack
from .rewards import fingerprint_reward, load_reward, reward_names
from .rewards import score as score_answers
from .rollout import Parts, check_rollouts, roll_out
from .runtime.files import append_lines, digest, drop_cut_line, read_checked_lines
from .runtime.log import Progress
from .runtime.rng import POOL
from .runtime.sources import read_any
from .tokens import Prompts

CHUNK = 4096  # answers that are scored before their scores are written
# The columns of a pool that are not its data's.
COLUMNS = (
    "index", "responses", "answers", "scores", "gold_scores", "prompt_ids", "response_ids",
)  # fmt: skip
LAYOUT = "lines with their index"  # goes into the files' names: older files, without, are not read


# ------------------------------------------------------------------------------------- the cache


class CacheFile:
    """A JSONL file of the cache that only ever grows. All processes read it, the first one writes.

    fits(i, row): whether row i, the first being 0, can be what was appended there. InputError: one
    that cannot. The folder is locked by its RunFolder: a second writer's lines would come between.
    """

    def __init__(
        self, folder: str, key: str, dist, fits: Callable[[int, object], bool], remedy: str = ""
    ):
        self.path = os.path.join(folder, "cache", key + ".jsonl")
        self.dist = dist
        if not remedy:
            remedy = f"delete {self.path}, it is made again"

        # The first process has written what it was given before: a gold reward may be a member too.
        dist.barrier()
        self.rows = dist.together(lambda: read_checked_lines(self.path, fits, remedy))
        dist.barrier()  # all have read before one writes
        # A line that a kill has cut short is dropped: the next one must not be joined to it.
        if dist.main:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            drop_cut_line(self.path)

    def append(self, rows: list[dict]):
        """Add the next lines."""
        self.rows += rows
        if self.dist.main:
            append_lines(self.path, rows)


def holds_answers(row, index: int, prompt_ids: list[int], N: int) -> bool:
    """Whether a row of the cache holds N answers to the prompt of this index, a token list."""
    if not isinstance(row, dict) or row.get("index") != index:
        return False
    if row.get("prompt_ids") != prompt_ids or not isinstance(row.get("prompt"), str | list):
        return False
    ids = row.get("response_ids")
    if not is_list(row.get("responses"), N, str) or not is_list(ids, N, list):
        return False
    # No answer is empty: it has its EOS, or the tokens after which it was cut off.
    return all(response and is_list(response, len(response), int) for response in ids)


def holds_scores(row, index: int, N: int) -> bool:
    """Whether a row of the cache holds the scores of N answers to the prompt of this index."""
    if not isinstance(row, dict) or row.get("index") != index:
        return False
    return is_list(row.get("scores"), N, float)


def is_list(value, length: int, kind: type) -> bool:
    """Whether a value from JSON is a list of this length, all of one type."""
    if not isinstance(value, list) or len(value) != length:
        return False
    # isinstance() would take True for an int.
    return all(type(x) is kind for x in value)


# ----------------------------------------------------------------------------------- the answers


def sample(config, tokenizer, prompts: Prompts, dist) -> list[dict]:
    """Sample N answers to each prompt. -> one row a prompt:

        {index, prompt, responses, prompt_ids, response_ids[, row]}

    row: the data's own row, where it has further columns. The noise of an answer is keyed by (seed,
    prompt, answer), in a stream of its own: neither the batch size nor the number of processes
    changes it, and it is not the noise of any evaluation.
    """
    N = config.n_answers
    # The stream is part of the key: a pool that older noise began is not gone on with.
    settings = (N, config.max_new_tokens, config.temperature, config.seed, config.dtype, POOL)
    key = "answers_" + digest(LAYOUT, fingerprint(config.model), prompts.ids, settings)

    def fits(i, row):
        return i < len(prompts) and holds_answers(row, i, prompts.ids[i], N)

    # Where all answers are in the file already, no model has to be loaded.
    cache = CacheFile(config.output_dir, key, dist, fits)
    if len(cache.rows) == len(prompts):
        return add_own_rows(cache.rows, prompts)

    # As many prompts at once as their answers fit into a batch, and at least one.
    policy = load_policy(config.model, value_head=False, device=dist.device)
    check_rollouts(policy)
    parts = Parts(config, dist, tokenizer, policy)
    prompts_at_once = max(1, config.batch_size // N)
    progress = Progress(dist, "sampling, prompt", len(prompts), len(cache.rows))
    # Each round writes its answers to the file, so that a run that is killed goes on from there.
    for first in range(len(cache.rows), len(prompts), prompts_at_once):
        last = min(first + prompts_at_once, len(prompts))
        cache.append(sample_rows(parts, prompts, range(first, last)))
        progress.step(last, "")
    progress.close()
    return add_own_rows(cache.rows, prompts)


def add_own_rows(rows: list[dict], prompts: Prompts) -> list[dict]:
    """Rows of the cache, with the data's own prompts, and its rows where they have more columns."""
    # The cache is JSON, which cannot hold a column of images, so these are taken from the data.
    complete = []
    for row, data_row in zip(rows, prompts.rows):
        complete.append({**row, "prompt": data_row["prompt"]})
        for key in ("row", "place"):
            if key in data_row:
                complete[-1][key] = data_row[key]
    return complete


def sample_rows(parts: Parts, prompts: Prompts, index: range) -> list[dict]:
    """Sample N answers to each of these prompts. -> their rows, as in sample()"""
    config = parts.config
    N = config.n_answers

    # All answers of these prompts, (prompt i, answer j), one prompt after another. The answers of
    # a single prompt may be too many for one batch.
    pairs = []
    for i in index:
        for j in range(N):
            pairs.append((i, j))
    responses = []
    for k in range(0, len(pairs), config.batch_size):
        responses += sample_batch(parts, prompts, pairs[k : k + config.batch_size])
    texts = parts.tokenizer.batch_decode(responses, skip_special_tokens=True)

    rows = []
    for p, i in enumerate(index):
        answers = slice(p * N, (p + 1) * N)
        row = {
            "index": i,
            "prompt": prompts.rows[i]["prompt"],
            "responses": texts[answers],
            "prompt_ids": prompts.ids[i],
            "response_ids": responses[answers],
        }
        rows.append(row)
    return rows


def sample_batch(parts: Parts, prompts: Prompts, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Sample the answers (prompt i, answer j), by all processes together. -> their token lists"""
    dist = parts.dist

    def sample_mine():
        index = []  # of the prompts
        places = []  # one number for each answer keys its noise
        for k in dist.part(len(pairs)):
            i, j = pairs[k]
            index.append(i)
            # No two answers share a number, and --n_answers does not change it.
            places.append(i * 2**32 + j)
        if not places:  # there are fewer answers than processes
            shape = (0, parts.config.max_new_tokens)
            no_ids = torch.zeros(shape, dtype=torch.long, device=dist.device)
            return no_ids, no_ids.sum(1)
        rollout, _ = roll_out(parts, prompts.at(index), places, 0, POOL)
        return rollout.response_ids, rollout.response_mask.sum(1)

    # The ids are padded, and the padding token may be EOS: only the lengths say where a row ends.
    own_ids, own_lengths = dist.together(sample_mine)  # [n, R], [n]
    ids = dist.gather(own_ids).tolist()
    lengths = dist.gather(own_lengths).tolist()
    return [row[:length] for row, length in zip(ids, lengths)]


# --------------------------------------------------------------------------- answers from a file


def read(spec: str) -> list[dict]:
    """Read a pool that is there already. -> rows {prompt, responses[, gold_scores]}

    spec: a file of rows {prompt, responses: [str], gold_scores: [float]}, or a data set; also with
    the columns {instruction, input, answers, gold_scores}. A prompt may be a list of messages.
    gold_scores may be missing, then from all rows. InputError: a bad row, with its place.
    """
    rows = []
    for place, row in read_any(spec):
        new = read_row(place, row)
        is_alike = not rows or ("gold_scores" in new) == ("gold_scores" in rows[0])
        require(is_alike, f"{place}: some rows have gold_scores, and some have not")
        rows.append(new)
    require(rows, f"{spec}: no rows")
    return rows


def read_row(place: str, row) -> dict:
    """Check a row of a pool. -> {prompt, responses[, gold_scores]}, and what further_keys() adds.

    place: its file and line, for InputErrors.
    """
    require(isinstance(row, dict), f"{place}: a row must be an object with prompt and responses")
    # {prompt, responses} as sample_bon.py writes them, or {instruction, input, answers}.
    data_row = row  # with the data's own names of columns
    if "prompt" not in row and "instruction" in row:
        row = {**row, **rename_columns(place, row)}

    prompt = read_prompt(place, row.get("prompt"))
    responses = row.get("responses")
    are_texts = isinstance(responses, list) and all(isinstance(x, str) for x in responses)
    require(
        are_texts and responses,
        f"{place}: field 'responses' must be a list of at least one string",
    )
    new = {"prompt": prompt, "responses": responses}

    # Gold scores may come with the answers: then nothing has to compute them.
    gold = row.get("gold_scores")
    if gold is not None:
        are_numbers = isinstance(gold, list) and all(is_finite_number(x) for x in gold)
        require(are_numbers, f"{place}: field 'gold_scores' must be a list of finite numbers")
        require(
            len(gold) == len(responses),
            f"{place}: {len(gold)} gold_scores for {len(responses)} responses",
        )
        new["gold_scores"] = gold
    return new | further_keys(place, data_row, prompt)


def further_keys(place: str, row: dict, prompt) -> dict:
    """The keys of data.finish_row() for a row of a pool: {"place", "row"}, where they are needed.

    A pool that sample_bon.py wrote keeps the data's own row. In any other pool, every
    column outside COLUMNS is the data's.
    """
    # A row that holds more than the prompt is kept, since a reward may ask for it.
    keys = {}
    if is_chat(prompt):
        keys["place"] = place
    data_row = row.get("row")
    if not isinstance(data_row, dict):
        data_row = {name: value for name, value in row.items() if name not in COLUMNS}
    if data_row != {"prompt": prompt}:
        keys["row"] = data_row
    return keys


def rename_columns(place: str, row: dict) -> dict:
    """A row {instruction, input, answers} -> {prompt, responses}."""
    # Alpaca's columns: the input is what the instruction is about, and often empty.
    instruction = row["instruction"]
    further = row.get("input") or ""
    are_texts = isinstance(instruction, str) and isinstance(further, str)
    require(are_texts, f"{place}: instruction and input must be strings")
    prompt = instruction + further
    if instruction and further:
        prompt = f"{instruction}\n{further}"
    return {"prompt": prompt, "responses": row.get("answers", row.get("responses"))}


def is_finite_number(x) -> bool:
    """Whether a value from JSON is a number, and one that a sum of a few can hold."""
    return type(x) in (int, float) and abs(x) < 1e38


# ------------------------------------------------------------------------------------ the scores


def score(
    rows: list[dict], specs: list[str], tokenizer, config, dist
) -> dict[str, list[list[float]]]:
    """Score all answers by each reward of `specs`. -> {name: [[N floats] for each prompt]}

    The answers of a chunk are tokenized and sorted by length once, for all members of an ensemble.
    """
    spec_of = dict(zip(reward_names(specs), specs))  # {name: spec}
    is_templated = getattr(config, "chat_template", False)
    caches = open_scores(rows, spec_of, is_templated, config, dist)  # {name: its file}

    # A reward whose scores are all there is not even loaded.
    rewards = {}
    for name, spec in spec_of.items():
        if len(caches[name].rows) < len(rows):
            rewards[name] = load_reward(spec, tokenizer, dist, config.micro_batch_size)

    # All rewards score one chunk before the next: they share its tokens, and a killed run goes on
    # where each file ends.
    progress = Progress(dist, "scoring, prompt", len(rows))
    for first, last in split_into_chunks(rows):
        missing = [name for name in rewards if len(caches[name].rows) < last]
        if not missing:
            continue
        # All answers to a prompt are scored by one process: they share what is cut from it.
        mine = []  # (row, the place of an answer in it)
        for p in dist.part(last - first):
            row = rows[first + p]
            for j in range(len(row["responses"])):
                mine.append((row, j))
        answers = collect_answers(mine, is_templated)

        for name in missing:
            own_scores = score_answers(rewards[name], [answers], dist)
            scored = group_by_prompt(dist.gather(own_scores).tolist(), rows, first, last)
            # A kill may have come in the middle of a chunk, with a part of its lines written.
            n_there = len(caches[name].rows) - first
            caches[name].append(scored[n_there:])
        progress.step(last, f"{len(missing)} reward(s)")
    progress.close()

    scores_of = {}
    for name in spec_of:
        scores_of[name] = [row["scores"] for row in caches[name].rows]
    return scores_of


def open_scores(rows, spec_of: dict[str, str], chat: bool, config, dist) -> dict[str, CacheFile]:
    """Open the file of each reward's scores of these rows: {name: its file}.

    Copies of a model share one file.
    """
    # The file's name depends on all that a reward may read: texts, sampled ids, the data's columns.
    texts = []
    for row in rows:
        text = [row["prompt"], row["responses"], row.get("response_ids")]
        text += columns_for_files(row).values()
        texts.append(digest(*text))
    # What was scored without --chat_template keeps its name.
    data = digest(texts, chat) if chat else digest(texts)

    def fits(i, row):
        return i < len(rows) and holds_scores(row, i, len(rows[i]["responses"]))

    files = {}
    caches = {}
    for name, spec in spec_of.items():
        key = "scores_" + digest(LAYOUT, fingerprint_reward(spec), data)
        if key not in files:
            files[key] = CacheFile(config.output_dir, key, dist, fits)
        caches[name] = files[key]
    return caches


def split_into_chunks(rows: list[dict]) -> list[tuple[int, int]]:
    """Divide rows into chunks of about CHUNK answers: (its first row, the one after its last)."""
    chunks = []
    first = 0
    n_answers = 0
    for i, row in enumerate(rows):
        n_answers += len(row["responses"])
        if n_answers >= CHUNK or i == len(rows) - 1:
            chunks.append((first, i + 1))
            first = i + 1
            n_answers = 0
    return chunks


def group_by_prompt(scores: list[float], rows: list[dict], first: int, last: int) -> list[dict]:
    """Divide the scores of all answers to the prompts first .. last - 1. -> a line a prompt"""
    # Prompts of a pool that was read may have different numbers of answers.
    lines = []
    start = 0
    for i in range(first, last):
        end = start + len(rows[i]["responses"])
        lines.append({"index": i, "scores": scores[start:end]})
        start = end
    return lines


def collect_answers(chunk: list[tuple[dict, int]], chat: bool = False) -> Answers:
    """(row, place of an answer in it) -> Answers, with the sampled ids where rows have them."""
    prompts = []
    responses = []
    rows = []
    prompt_ids = []
    response_ids = []
    for row, j in chunk:
        prompts.append(row["prompt"])
        responses.append(row["responses"][j])
        rows.append(own_row(row))
        # Answers that were sampled here have ids, which a reward model may read as they are.
        if "response_ids" in row:
            prompt_ids.append(row["prompt_ids"])
            response_ids.append(row["response_ids"][j])
    batch = pack(prompt_ids, response_ids) if prompt_ids else None
    return Answers(prompts, responses, batch, rows, chat)


def matrix(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Lists of N numbers for each prompt, N may differ -> numbers [P, max N], mask [P, max N].

    The numbers are float64, with 0 in the padding; the mask says which of them are no padding.
    """
    numbers = []
    is_answer = []
    for row in rows:
        numbers.append(torch.tensor(row, dtype=torch.float64))
        is_answer.append(torch.ones(len(row), dtype=torch.bool))
    return pad_sequence(numbers, batch_first=True), pad_sequence(is_answer, batch_first=True)
