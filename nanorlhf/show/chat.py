"""Type a prompt, and see what policies answer, side by side, with their rewards.

    a policy before and after PPO:
        python -m nanorlhf.show.chat runs/sft runs/ppo
    three answers of each to a prompt, sampled at a lower temperature:
        python -m nanorlhf.show.chat runs/sft runs/ppo --n 3 --temperature 0.7
    prompts from a file, one on each line:
        python -m nanorlhf.show.chat runs/ppo < prompts.txt

A run folder, a model folder or a hub name can chat. A model whose tokenizer has
a chat template keeps its turns; any other reads each prompt alone. Ctrl-C,
Ctrl-D or /quit leaves.
"""

import contextlib
import signal
import sys
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from .. import world
from ..chat_templates import end_ids, find_control_token, pattern_of_control_tokens
from ..chats import Message
from ..errors import InputError, at_least, require
from ..hf.blocks import sampling
from ..hf.folders import check_model, context_length
from ..models import Policy, load_policy, load_tokenizer
from ..packing import Answers
from ..rewards import Reward, load_reward, reward_names
from ..rollout import SamplingFlags, check_rollouts, generate, left_pad
from ..runtime import cli
from ..runtime.distributed import Dist, autocast, setup
from ..runtime.flags import SEED_HELP, DeviceFlags
from ..tokens import answers_to, ids_with_tokens, ready_prompts
from .rewards_of_runs import choose_rewards
from .terminal import (
    in_one_line,
    name_runs,
    printable,
    read_line,
    side_by_side,
    terminal_width,
    until_nobody_reads,
)

HELP = """\
/reset   forget what has been said
/quit    leave (so do Ctrl-D and Ctrl-C)
/help    these lines
Anything else is a prompt. A chat goes on with the first of several answers."""


@dataclass
class Config(SamplingFlags, DeviceFlags):
    """The chat: who answers, and what scores the answers"""

    runs: list[str] = HfArg(
        kw_only=True,
        help="the policies: run folders, model folders or hub names; they may stand first, "
        "without --runs",
    )
    reward_model: list[str] = HfArg(
        default_factory=list,
        help="the rewards that score each answer (see train_ppo.py --help), or none; by default "
        "those that the runs were trained against",
    )
    gold_model: str = HfArg(
        default="", help="the gold reward; by default that of the runs, or the embedded world's own"
    )
    system: str = HfArg(
        default="", help="a system prompt, with which every chat begins; by default none"
    )
    plain: bool = HfArg(
        default=False, help="give prompts as plain texts, also where there is a chat template"
    )
    n: int = HfArg(default=1, help="how many answers each policy gives to a prompt")
    top_k: int = HfArg(default=0, help="sample from the k most likely tokens alone; 0: from all")
    top_p: float = HfArg(
        default=1.0, help="sample from the fewest tokens that have this probability together"
    )
    seed: int = HfArg(default=0, help=SEED_HELP)

    max_new_tokens: int = HfArg(
        default=256, help="tokens in the longest answer; fewer where the model's context ends"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "n")
        at_least(self, 0, "top_k", "seed")
        require(0 < self.top_p <= 1, "--top_p must lie between 0 and 1")


@dataclass
class Speaker:
    """A policy in the chat, and what has been said to it and by it."""

    name: str
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    keeps_turns: bool  # by its chat template
    turns: list[Message] = field(default_factory=list)


def main(config: Config):
    """Chat until Ctrl-C, Ctrl-D, /quit or the end of the input."""
    try:
        with until_nobody_reads():
            speakers, rewards, dist = open_chat(config)
            talk(config, speakers, rewards, dist)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end the ending
        print()


# ---------------------------------------------------------------------------- who is in the chat


def open_chat(config: Config) -> tuple[list[Speaker], dict[str, Reward], Dist]:
    """Load the policies and the rewards, and say who is there."""
    dist = setup(config.device)
    require(dist.world == 1, "a chat runs on one process")

    # Whatever can be wrong is looked at before the first model is loaded.
    tokenizers = []
    for run in config.runs:
        check_model(run)
        tokenizer = load_tokenizer(run)
        require(
            not config.system or keeps_turns(config, tokenizer),
            f"--system is for chats, and {run} reads each prompt alone",
        )
        tokenizers.append(tokenizer)
    # The world's gold reads the world's words alone: it is a default if a policy writes in them.
    in_world = any(is_of_world(tokenizer) for tokenizer in tokenizers)
    specs, notes = choose_rewards(config.runs, config.reward_model, config.gold_model, in_world)

    # Policies answer and are not trained: they need no value head.
    speakers = []
    for name, run, tokenizer in zip(reward_names(config.runs), config.runs, tokenizers):
        policy = load_policy(run, value_head=False, device=dist.device)
        check_rollouts(policy)
        speaker = Speaker(printable(name), policy, tokenizer, keeps_turns(config, tokenizer))
        speakers.append(speaker)

    # A reward model reads the sampled ids as they are if they are those of all policies.
    first = tokenizers[0]
    if any(tokenizer.get_vocab() != first.get_vocab() for tokenizer in tokenizers):
        first = None
    rewards = {}
    for name, spec in zip(reward_names(specs), specs):
        rewards[name] = load_reward(spec, first, dist, dtype=config.dtype)

    for note in notes:
        print(in_one_line(note))
    # Where prompts come from a file, nobody is there to be greeted.
    if sys.stdin.isatty():
        introduce(speakers, rewards)
    return speakers, rewards, dist


def keeps_turns(config: Config, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a policy with this tokenizer reads a whole chat, and not each prompt alone."""
    return bool(tokenizer.chat_template) and not config.plain


def introduce(speakers: list[Speaker], rewards: dict[str, Reward]):
    """Say who is there, and what scores the answers."""
    for speaker in speakers:
        manner = "reads each prompt alone"
        if speaker.keeps_turns:
            manner = "keeps the turns of the chat"
        print(f"{speaker.name} {manner}")
    names = ", ".join(rewards) or "nothing"
    print(f"Answers are scored by {in_one_line(names)}. /help lists the commands.")


# --------------------------------------------------------------------------------- the conversation


def talk(config: Config, speakers: list[Speaker], rewards: dict[str, Reward], dist: Dist):
    """Read prompts and print answers until there is no further prompt."""
    turn = 0
    while True:
        # A command is a single word. A prompt of several words may begin with a slash.
        line = read_line()
        if line is None or line == "/quit":
            return
        if line == "/help":
            print(HELP)
        elif line == "/reset":
            for speaker in speakers:
                speaker.turns.clear()
        elif line.startswith("/") and " " not in line:
            print(f"no command {in_one_line(line)}; there are /reset, /quit and /help")
        elif line:
            # The noise of step 0 is that of evaluations.
            turn += 1
            answer_prompt(config, speakers, rewards, dist, line, turn)
        sys.stdout.flush()


def answer_prompt(
    config: Config,
    speakers: list[Speaker],
    rewards: dict[str, Reward],
    dist: Dist,
    prompt: str,
    turn: int,
):
    """Print what every speaker answers to a prompt, side by side, one line of scores below each."""
    # A prompt that one speaker cannot read is an error of that speaker alone: the others answer.
    cells = []  # for each speaker the texts of its n answers, or one error
    problems = []
    notes = []
    for speaker in speakers:
        try:
            check_prompt(speaker, prompt)
            answers, was_cut = sample_answers(config, speaker, prompt, turn, dist)
        except InputError as e:
            problems.append(str(e))
            cells.append([f"{speaker.name}:\n{in_one_line(str(e))}"])
            continue
        scores, faults = score_answers(answers, rewards)
        notes += faults
        cells.append(describe_answers(speaker, answers, was_cut, scores))
        # Each speaker remembers its own answer, so from the second turn on their chats differ.
        if speaker.keeps_turns:
            question = {"role": "user", "content": prompt}
            reply = {"role": "assistant", "content": answers.responses[0]}
            speaker.turns += [question, reply]

    # What is wrong with the prompt for all of them is said once.
    if len(problems) == len(speakers) and len(set(problems)) == 1:
        print(in_one_line(problems[0]))
        return
    # Row j has the j-th answer of every speaker. All answers of a row were sampled with one noise.
    width = terminal_width()
    for j in range(config.n):
        row = []
        for texts in cells:
            row += texts[j : j + 1] or [""]  # an error stands in the first row alone
        print(side_by_side(row, width))
        print()
    for note in dict.fromkeys(notes):
        print(in_one_line(note))


def check_prompt(speaker: Speaker, prompt: str):
    """InputError where a prompt holds what this policy cannot read as the text that it is."""
    tokenizer = speaker.tokenizer
    # A prompt that spells <|im_end|> would end the user's turn, and could go on as the assistant.
    if speaker.keeps_turns:
        pattern = pattern_of_control_tokens(tokenizer)
        token = find_control_token(tokenizer, pattern, {"prompt": prompt})
        require(not token, f"the prompt spells {token}, which the chat template takes for its own")
    # The world's tokenizer turns every unknown word into <unk>, without an error.
    if is_of_world(tokenizer):
        known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        unknown = [word for word in prompt.split() if word not in known]
        names = ", ".join(dict.fromkeys(unknown))  # each once
        require(
            not unknown,
            f"the embedded world has no word for: {names} (it knows {len(known)} words, in small "
            "letters, and a mark stands alone: review the hotel :)",
        )


def is_of_world(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer knows the words of the embedded world, and no others."""
    return set(tokenizer.get_vocab()) == set(world.vocabulary())


def sample_answers(
    config: Config, speaker: Speaker, prompt: str, turn: int, dist: Dist
) -> tuple[Answers, list[bool]]:
    """n answers of a speaker, and which of them were cut off before they ended.

    The noise is keyed by the turn and the answer's number. So all speakers draw the same numbers:
    what differs between two answers side by side is the policies' doing.
    """
    # The prompt becomes a row of data, so that it is encoded in the way that training encodes it.
    tokenizer = speaker.tokenizer
    row = {"prompt": prompt}
    if speaker.keeps_turns:
        messages = [*speaker.turns, {"role": "user", "content": prompt}]
        if config.system:
            messages = [{"role": "system", "content": config.system}, *messages]
        row = {"prompt": messages}

    # One token of an answer must fit at least; the others may have less room than the flag says.
    lm = speaker.policy.lm
    prompts = ready_prompts(tokenizer, [row], lm.config, 1, config.max_prompt_length)
    (ids,) = prompts.ids
    max_new_tokens = config.max_new_tokens
    context = context_length(lm.config)
    if context is not None:
        max_new_tokens = min(max_new_tokens, context - len(ids))

    # The n answers differ although their prompt is the same: the noise is keyed by the row, too.
    prompt_ids, mask = left_pad([ids] * config.n, tokenizer.pad_token_id)  # [n, P]
    with autocast(dist, config.dtype), sampling(lm):
        rollout = generate(
            speaker.policy,
            prompt_ids.to(dist.device),
            mask.to(dist.device),
            max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            eos_token_id=end_ids(tokenizer),
            has_token=ids_with_tokens(tokenizer, lm.config.get_text_config().vocab_size),
            pad_token_id=tokenizer.pad_token_id,
            seed=config.seed,
            step=turn,
        )
    # Rewards get the text without special tokens such as EOS, and also the ids that were sampled.
    responses = rollout.texts(tokenizer)
    answers = answers_to(prompts.at([0] * config.n), responses, rollout.packed(), False)
    was_cut = (~rollout.finished).tolist()
    return answers, was_cut


def score_answers(
    answers: Answers, rewards: dict[str, Reward]
) -> tuple[list[list[str]], list[str]]:
    """For each of n answers its scores, as texts ["rm +0.50"]; and what rewards could not score."""
    scores = [[] for _ in answers.responses]  # a list of texts for each answer
    faults = []
    for name, reward in rewards.items():
        shown_name = in_one_line(name)
        try:
            numbers = reward(answers).tolist()
        except InputError as e:
            # A prompt that is typed may have no gold: the other rewards still score its answers.
            faults.append(str(e))
            for scores_of_answer in scores:
                scores_of_answer.append(f"{shown_name} ?")
            continue
        for scores_of_answer, number in zip(scores, numbers):
            scores_of_answer.append(f"{shown_name} {number:+.2f}")
    return scores, faults


def describe_answers(
    speaker: Speaker, answers: Answers, was_cut: list[bool], scores: list[list[str]]
) -> list[str]:
    """For each of n answers a text: whose it is, what it says, and its scores."""
    n_answers = len(answers)
    texts = []
    for j, response in enumerate(answers.responses):
        title = speaker.name
        if n_answers > 1:
            title += f" ({j + 1} of {n_answers})"
        numbers = list(scores[j])
        if was_cut[j]:
            numbers.append("[cut off]")
        # A model may write anything, escape codes for the terminal too.
        text = printable(response) or "(no words)"
        texts.append(f"{title}:\n{text}\n{'   '.join(numbers)}".rstrip())
    return texts


def run(args: list[str] | None = None):
    """The command line: RUN [RUN ...] [flags]"""
    # With it, input() lets a line be edited, and the arrows bring back earlier ones.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    with cli.errors_in_one_line():
        main(cli.parse(Config, name_runs(args), "RUN [RUN ...]"))


if __name__ == "__main__":
    run()
