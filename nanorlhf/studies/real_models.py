r"""Every method once on a real instruction model, SmolLM2-135M-Instruct.

    two runs side by side, one thread each; goes on where it was stopped:
        python -m nanorlhf.studies.real_models --model FOLDER \
            --instructions instructions.json --lexicon vader_lexicon.tsv \
            --polite_pairs pairs.json --hh hh.jsonl --safety safety.jsonl \
            --rm_bench rm_bench.json --encoder ENCODER
    the same tables from a few steps of each run:
        python -m nanorlhf.studies.real_models --model FOLDER --quick
    its commands with their sizes; runs nothing:
        python -m nanorlhf.studies.real_models --model FOLDER --dry_run

FOLDER holds the model, as downloaded from the hub. A part whose file is not
named is left out, and the study says so. What each run has found is kept in
real_models.json and not run again. For another model name a file and a folder
of its own: --results and --output_dir.

The data that the commands read are written by real_models_data.py; tables:
real_models_results.py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..errors import at_least, require
from ..hf.folders import check_model
from ..runtime import cli
from ..runtime.files import check_can_write
from .common import (
    StudyFlags,
    join,
    read_flags,
)
from .kept_cells import (
    Cell,
    KeptFlags,
    read_cells,
    results_file,
    run_cells,
)
from .plan import print_plan
from .real_models_data import write_data
from .real_models_results import (
    print_tables,
    read_autoencoders,
    read_benchmark,
    read_bon,
    read_divergence,
    read_diversity,
    read_features,
    read_judge,
    read_mmcs,
    read_policy,
    read_probe,
    read_reward_model,
)

# Width, blocks and vocabulary of SmolLM2-135M-Instruct: real_models.json is of this model.
SIZES = (576, 30, 49152)

# The parts, and the flags of the files without which a part is left out.
PARTS = {
    "lexicon": ("instructions", "lexicon"),
    "sums": (),
    "judge": (),
    "polite": ("polite_pairs", "instructions"),
    "refusals": ("safety", "rm_bench"),
    "diversity": ("instructions", "lexicon"),
    "inside": ("instructions", "lexicon"),
    "hh": ("hh",),
}

# A policy is the model with adapters. A rollout is gone through once, in steps of 16 answers. With
# 16 answers a rollout PPO moved away from the model and won no reward.
POLICY = "--lora_rank 16 --lr 1e-3 --ppo_epochs 1 --minibatch_size 16 --eval_every 0 --n_samples 2"
# A reward model learns in its upper blocks alone, which costs half as much.
REWARD_MODEL = "--freeze_layers 0.8 --lr 1e-4 --batch_size 8"
LABEL_NOISE = 0.25
# Sampling as in training, and almost without chance.
TEMPERATURES = (1, 0.01)
BFLOAT16 = "--dtype bfloat16"

# What --quick puts in the place of the flags' defaults.
QUICK = {
    "seeds": 1,
    "members": 2,
    "steps": 2,
    "sums_steps": 2,
    "rm_ppo_steps": 2,
    "batch_size": 32,
    "rm_steps": 2,
    "rm_steps_long": 2,
    "sae_steps": 4,
    "sarm_pairs": 32,
    "texts": 24,
    "triples": 20,
    "prompts": 4,
    "n_answers": 4,
    "test_pairs": 8,
    "test_questions": 8,
    "reviews": 8,
    "features": 2,
}


# In all functions a are the study's Settings, and s is a seed.

# -------------------------------------------------------------------------------------- commands


def model_of(a) -> str:
    """The model, as commands name it: a link to --model, so that kept commands name no machine."""
    return f"{a.output_dir}/model"


def data_of(a) -> str:
    """The folder of all data."""
    return f"{a.output_dir}/data"


def make_cell(a, name: str, command: str, read: Callable, needs: list[Cell] = ()) -> Cell:
    """A cell whose command writes a folder of the cell's name. needs: cells that run before it."""
    # What a needed cell itself needs comes ahead of it. Each command is listed once.
    before = []
    for cell in needs:
        for needed in (*cell.needs, cell.command):
            if needed not in before:
                before.append(needed)
    return Cell(name, f"{command} --output_dir {a.output_dir}/{name}", before, read)


def folder_of(a, cell: Cell) -> str:
    return f"{a.output_dir}/{cell.name}"


def policy_cell(a, name: str, s: int, flags: str, needs: list[Cell] = ()) -> Cell:
    """A run of train_ppo.py from the model."""
    model = f"train_ppo.py --model {model_of(a)} --seed {s} --eval_size {a.prompts} {BFLOAT16}"
    return make_cell(a, name, join(model, POLICY, flags, a.ppo_flags), read_policy, needs)


def reward_cell(a, name: str, flags: str) -> Cell:
    """A run of train_rm.py from the model."""
    model = f"train_rm.py --model {model_of(a)} {BFLOAT16}"
    return make_cell(a, name, join(model, REWARD_MODEL, flags, a.rm_flags), read_reward_model)


def benchmark_cell(a, name: str, rewards: str, flags: str, needs: list[Cell]) -> Cell:
    """A run of probe.py evaluate."""
    command = f"probe.py evaluate --reward_model {rewards} {flags} {BFLOAT16}"
    return make_cell(a, name, command, read_benchmark, needs)


# ----------------------------------------------------------------------------------------- parts

# The cells of a part are stages: what stands in one list needs cells of earlier lists alone.
Stages = list[list[Cell]]


def lexicon_cell(a, kl_coef: float) -> Cell:
    """PPO on the words of a lexicon. diversity_cells() and inside_cells() start from it too."""
    data = f"--dataset {data_of(a)}/prompts.jsonl --reward_model {data_of(a)}/lexicon.tsv"
    size = size_of_rollouts(a, a.steps, a.batch_size)
    name = f"lexicon/kl_{kl_coef:g}/seed_0"
    return policy_cell(a, name, 0, f"{data} {size} --kl_coef {kl_coef:g}")


def size_of_rollouts(a, steps: int, batch_size: int) -> str:
    """The flags of how much PPO samples."""
    return f"--steps {steps} --batch_size {batch_size} --max_new_tokens {a.max_new_tokens}"


def size_of_pool(a) -> str:
    """The flags of how many answers best-of-n and diversity have."""
    size = f"--n_answers {a.n_answers} --max_new_tokens {a.max_new_tokens}"
    return f"--eval_size {a.prompts} {size}"


def lexicon_cells(a) -> Stages:
    # A run takes more than 20 minutes: one seed.
    return [[lexicon_cell(a, kl_coef) for kl_coef in (0.05, 0)]]


def sums_cells(a) -> Stages:
    """GRPO on sums whose answers can be checked, with a smaller reward for their form."""
    # The form alone pays a fifth of a right answer: enough to be learned, too little to prefer it.
    rewards = f"{data_of(a)}/rewards.py:is_right {data_of(a)}/rewards.py:is_in_form"
    data = f"--dataset {data_of(a)}/sums.jsonl --reward_model {rewards} --reward_weights 1 0.2"
    # GRPO's paper has the KL in the loss, estimated by k3, and a mean over each answer's tokens.
    method = "--advantage grpo --loss_mean sequence --kl_in loss --kl_kind k3 --kl_coef 0.02"
    size = f"--steps {a.sums_steps} --group_size 8 --batch_size {a.batch_size} --max_new_tokens 16"
    policies = []
    for s in range(a.seeds):
        policies.append(policy_cell(a, f"sums/seed_{s}", s, f"{data} {method} {size}"))

    # Has GRPO learned sums, or only to be certain? Almost without chance the model is certain too.
    answers = []
    for temperature in TEMPERATURES:
        name = f"sums/temperature_{temperature:g}"
        answers.append(sums_pool(a, f"{name}/before", model_of(a), temperature))
        for s, policy in enumerate(policies):
            folder = folder_of(a, policy)
            answers.append(sums_pool(a, f"{name}/seed_{s}", folder, temperature, [policy]))
    return [policies, answers]


def sums_pool(a, name: str, model: str, temperature: float, needs: list[Cell] = ()) -> Cell:
    """Four answers to each held-out sum at a temperature."""
    reward = f"--reward_model {data_of(a)}/rewards.py:is_right"
    # Four answers to each sum: one answer to each of 24 sums would be too coarse a share.
    command = join(
        f"sample_bon.py --model {model} --dataset {data_of(a)}/sums.jsonl {reward} {BFLOAT16}",
        f"--eval_size {a.prompts} --n_answers 4 --max_new_tokens 16 --temperature {temperature:g}",
    )
    return make_cell(a, name, command, read_bon, needs)


def polite_cells(a) -> Stages:
    """Reward models of polite answers; best-of-n and PPO against one and against all of them.

    Their judge has learned from other pairs, without wrong labels.
    """
    data = data_of(a)
    # All reward models are tested on the same pairs, which none of them learns from.
    test = f"--eval_dataset {data}/polite_test.jsonl --eval_size {a.test_pairs}"
    judge_flags = f"--dataset {data}/polite_judge.jsonl {test} --steps {a.rm_steps}"
    judge = reward_cell(a, "polite/judge", judge_flags)
    # Members differ in --seed alone: the same labels are wrong for all of them.
    members = []
    for s in range(a.members):
        flags = f"--dataset {data}/polite_members.jsonl {test} --steps {a.rm_steps} --seed {s}"
        flags += f" --label_noise {LABEL_NOISE}"
        members.append(reward_cell(a, f"polite/members/seed_{s}", flags))
    # A judge that reads the questions must become worse where these are exchanged.
    moved = moved_cell(a, "polite/moved", judge, f"{data}/polite_moved.jsonl", "")

    # The same answers are chosen from by each member and by all of them.
    gold = f"--gold_model {folder_of(a, judge)}"
    all_members = f"{a.output_dir}/polite/members/seed_{{seed}}"
    prompts = f"--dataset {data}/prompts.jsonl"
    pool = join(
        f"sample_bon.py --model {model_of(a)} {prompts} {BFLOAT16}",
        f"--reward_model {all_members} {gold} {size_of_pool(a)}",
    )
    bon = make_cell(a, "polite/bon", pool, read_bon, [judge, *members])

    # These are dear: five reward models score each answer.
    size = size_of_rollouts(a, a.rm_ppo_steps, a.batch_size // 2)
    # {seed} in a reward's name stands for all members; PPO maximises their mean by default.
    policies = []
    rewards = {"one": folder_of(a, members[0]), "all": all_members}
    needed = {"one": [judge, members[0]], "all": [judge, *members]}
    for label, reward in rewards.items():
        for s in range(a.seeds):
            flags = f"{prompts} --reward_model {reward} {gold} {size}"
            name = f"polite/ppo_{label}/seed_{s}"
            policies.append(policy_cell(a, name, s, flags, needed[label]))
    return [[judge, *members], [*policies, bon, moved]]


def moved_cell(a, name: str, reward_model: Cell, dataset: str, flags: str) -> Cell:
    """A reward model on a test whose questions have the answers of others."""
    # --eval_size 0: all pairs of the test.
    data = join(f"--dataset {dataset} --eval_size 0", flags)
    return benchmark_cell(a, name, folder_of(a, reward_model), data, [reward_model])


def hh_cells(a) -> Stages:
    """Reward models of helpful dialogues."""
    data = data_of(a)
    # Dialogues are long: where one does not fit, the beginning of its prompt is cut off first.
    length = "--max_length 256"
    test = f"--eval_dataset {data}/hh_test.jsonl --eval_size {a.test_pairs}"
    training = f"--dataset {data}/hh_train.jsonl {test} {length} --steps {a.rm_steps_long}"
    reward_models = []
    moved = []
    for s in range(a.seeds):
        trained = reward_cell(a, f"hh/rm/seed_{s}", f"{training} --seed {s}")
        reward_models.append(trained)
        dataset = f"{data}/hh_moved.jsonl"
        moved.append(moved_cell(a, f"hh/moved/seed_{s}", trained, dataset, length))
    return [reward_models, moved]


def judge_cells(a) -> Stages:
    """The model as a judge of reviews whose gold is known, each of two standing first once."""
    data = data_of(a)
    # A has more gold in every pair, so world:gold must choose A every time: a check of the command.
    answers = f"--a {data}/better.jsonl --b {data}/worse.jsonl"
    judges = f"--judge llm:{model_of(a)} world:gold --forced_choice"
    return [[make_cell(a, "judge", f"probe.py judge {answers} {judges}", read_judge)]]


def diversity_cells(a) -> Stages:
    """How different the answers of the model, of its best-of-n and of a policy are."""
    data = data_of(a)
    # PPO on a lexicon repeats a few words. A measure of diversity has to show that.
    policy = lexicon_cell(a, 0.05)
    measures = f"--diversity --tokenizer {model_of(a)}"
    if a.encoder:
        measures += f" --encoder {a.output_dir}/encoder"
    if a.nli_model:
        measures += f" --nli_model {a.output_dir}/nli_model"
    sampling = f"--dataset {data}/prompts.jsonl --reward_model {data}/lexicon.tsv {BFLOAT16}"
    flags = f"{sampling} {size_of_pool(a)} {measures}"

    # The best of a few answers, drawn from the model's again and again.
    best = f"--best_of {max(2, a.n_answers // 4)}"
    of_model = f"sample_bon.py --model {model_of(a)} {flags} {best}"
    of_policy = f"sample_bon.py --model {folder_of(a, policy)} {flags}"
    before = make_cell(a, "diversity/model", of_model, read_diversity)
    after = make_cell(a, "diversity/policy", of_policy, read_diversity, [policy])
    return [[before, after]]


def inside_cells(a) -> Stages:
    """What PPO on the lexicon has changed inside: weights, activations, features, and a probe."""
    data = data_of(a)
    # The run with a KL penalty is looked at, the one that has moved less.
    policy = lexicon_cell(a, 0.05)
    models = f"--model {model_of(a)} --policy {folder_of(a, policy)}"
    texts = f"--dataset {data}/texts.jsonl"
    held_out = f"--eval_size {max(2, a.texts // 4)}"
    middle, last = layers_of(a)
    layers = f"--layers {middle},{last}"

    def inside_cell(label: str, command: str, read: Callable, more: list[Cell] = ()) -> Cell:
        return make_cell(a, f"inside/{label}", command, read, [policy, *more])

    sites = f"{texts} --sites mlp residual {BFLOAT16}"
    command = f"probe.py divergence {models} {sites}"
    divergence = inside_cell("divergence", command, read_divergence)

    # Activations are computed once and kept: the model is what costs.
    command = join(
        f"train_sae.py --model {folder_of(a, policy)} --base {model_of(a)} {texts} {held_out}",
        f"{layers} --expansion 4 --k 32 --steps {a.sae_steps} --batch_size 512 {BFLOAT16}",
        f"--cache {a.output_dir}/inside/sae_cache",
    )
    saes = inside_cell("sae", command, read_autoencoders)

    # Words are put into plain texts, as chats have fixed ends.
    plain_texts = f"--dataset {data}/plain_texts.jsonl --triples {a.triples}"
    # Probes of what a word is worth, of the same less a neutral word, and of a whole text's worth.
    tasks = {
        "word": f"--task word {plain_texts}",
        "difference": f"--task word --difference true {plain_texts}",
        "sequence": f"--task sequence {texts}",
    }
    probes = []
    for label, task in tasks.items():
        flags = f"{task} --reward {data}/lexicon.tsv {layers} --seeds 5 {BFLOAT16}"
        command = f"probe.py reward {models} {flags}"
        probes.append(inside_cell(f"probe_{label}", command, read_probe))

    # The explainer is the model before PPO: it is asked what features of the policy stand for.
    folder = folder_of(a, saes)
    command = join(
        f"probe.py features --sae {folder}/policy/{last}_mlp {texts} {held_out} {BFLOAT16}",
        f"--top {a.features} --contexts 4 --explainer {model_of(a)} --plain_answers",
        "--related_to sentiment",
    )
    features = inside_cell("features", command, read_features, [saes])
    command = f"probe.py mmcs --a {folder}/base/* --b {folder}/policy/*"
    mmcs = inside_cell("mmcs", command, read_mmcs, [saes])
    # Features and MMCS read the autoencoders, so they come in a stage of their own.
    return [[saes, *probes, divergence], [features, mmcs]]


def layers_of(a) -> tuple[int, int]:
    """The numbers of a middle block and of the last one."""
    blocks = check_model(a.model).get_text_config().num_hidden_layers
    return (blocks - 1) // 2, blocks - 1


def refusals_cells(a) -> Stages:
    """Reward models of refusals, dense and as a SARM, on each split by questions."""
    # Four stages: dense reward models, autoencoders, SARMs, tests. All splits share each stage.
    stages = [[], [], [], []]
    for s in range(a.seeds):
        for stage, cells in zip(stages, refusals_of_split(a, s)):
            stage += cells
    return stages


def refusals_of_split(a, s: int) -> Stages:
    """The two reward models of one split by questions, and their tests."""
    data = data_of(a)
    # A seed is a split of the questions. {} is filled with dense, sae, sarm or a test's name.
    name = f"refusals/{{}}/seed_{s}"
    length = f"--max_length {a.max_length}"
    test = f"--eval_dataset {data}/safety_{s}_test.jsonl --eval_size {a.test_questions}"
    pairs = f"--dataset {data}/safety_{s}_train.jsonl"
    training = f"{pairs} {test} {length} --steps {a.rm_steps_long} --seed {s}"
    # Split s is tested on the questions that it has not learned from.
    dense = reward_cell(a, name.format("dense"), training)

    # The SARM's features are put on the finished dense model.
    trunk = folder_of(a, dense)
    sae = make_cell(
        a,
        name.format("sae"),
        join(
            f"train_sae.py --model {trunk} --base none {pairs} --kind pairs {length}",
            f"--max_rows {a.sarm_pairs} --steps {a.sae_steps} --seed {s} {BFLOAT16}",
            f"--cache {a.output_dir}/refusals/sae_cache_{s}",
            features_of_last_tokens(a),
        ),
        read_autoencoders,
        [dense],
    )
    sarm_flags = f"--sarm {folder_of(a, sae)} --sarm_mode frozen --lr 3e-2 --batch_size 8"
    command = f"train_rm.py --model {trunk} {sarm_flags} {training} {BFLOAT16}"
    sarm = make_cell(a, name.format("sarm"), command, read_reward_model, [dense, sae])

    # All three rewards are measured on the same texts. fits() is a control: it sees nothing but
    # whether an answer is cut.
    rewards = f"{trunk} {folder_of(a, sarm)} {data}/rewards.py:fits"
    needs = [dense, sae, sarm]
    tests = {
        "test": f"--dataset {data}/safety_{s}_test.jsonl --eval_size 0",
        "moved": f"--dataset {data}/safety_{s}_moved.jsonl --eval_size 0",
        "rm_bench": f"--benchmark rm_bench --dataset {data}/rm_bench.jsonl --chat_template",
    }
    benchmarks = []
    for label, flags in tests.items():
        flags = f"{flags} {length}"
        benchmarks.append(benchmark_cell(a, name.format(label), rewards, flags, needs))
    return [[dense], [sae], [sarm], benchmarks]


def features_of_last_tokens(a) -> str:
    """The flags of an autoencoder that a reward model can read: that of its last block's output."""
    _, last = layers_of(a)
    # A reward model's score is read at a text's last token, so only features of that one are used.
    place = f"--site residual --layers {last} --tokens last --keep_bos"
    kind = "--normalize token --relu False --expansion 4 --k 32"
    return f"{place} {kind} --batch_size 128 --eval_size 16"


CELLS = {
    "lexicon": lexicon_cells,
    "sums": sums_cells,
    "judge": judge_cells,
    "polite": polite_cells,
    "refusals": refusals_cells,
    "diversity": diversity_cells,
    "inside": inside_cells,
    "hh": hh_cells,
}


def missing_files(a, part: str) -> str:
    """The flags of files that a part needs and that are not given."""
    return " ".join(f"--{name}" for name in PARTS[part] if not getattr(a, name))


# ------------------------------------------------------------------------------------- the study


@dataclass
class Settings(KeptFlags, StudyFlags):
    """The model, the files of data, and how long all runs are"""

    model: str = HfArg(kw_only=True, help="the folder of the model")
    instructions: str = HfArg(
        default="", help="rows {instruction, input, output}: prompts, and texts to look inside on"
    )
    lexicon: str = HfArg(default="", help="FILE.tsv, WORD and VALUE: the reward of PPO")
    polite_pairs: str = HfArg(default="", help="rows {instruction, input, chosen, rejected}")
    hh: str = HfArg(default="", help="rows {chosen, rejected}: dialogues of HH-RLHF")
    safety: str = HfArg(default="", help="rows {prompt, chosen, rejected} to learn refusals from")
    rm_bench: str = HfArg(default="", help="rows of RM-Bench, to test refusals on")
    encoder: str = HfArg(default="", help="the folder of a sentence encoder")
    nli_model: str = HfArg(default="", help="the folder of an MNLI model")
    parts: list[str] = HfArg(
        default_factory=lambda: list(PARTS),
        metadata={"choices": tuple(PARTS)},
        help="which parts to run",
    )
    output_dir: str = HfArg(default="runs/real_models", help="the folder of data and of all runs")
    seeds: int = HfArg(default=3, help="how many seeds, or splits, a part of training has")
    members: int = HfArg(default=5, help="reward models in the ensemble")
    steps: int = HfArg(default=30, help="rollouts of PPO on the lexicon")
    sums_steps: int = HfArg(default=20, help="rollouts of GRPO on sums")
    rm_ppo_steps: int = HfArg(default=12, help="rollouts of PPO on reward models")
    batch_size: int = HfArg(
        default=64, help="answers in a rollout of PPO; half as many on reward models"
    )
    max_new_tokens: int = HfArg(default=32, help="tokens in the longest answer")
    rm_steps: int = HfArg(default=50, help="steps of a reward model of polite answers")
    rm_steps_long: int = HfArg(default=24, help="steps of one on dialogues and of refusals")
    max_length: int = HfArg(default=512, help="tokens in the longest question with its refusal")
    sae_steps: int = HfArg(default=400, help="steps of autoencoders")
    sarm_pairs: int = HfArg(default=200, help="pairs that a SARM's features are learned from")
    texts: int = HfArg(default=240, help="texts to look inside on")
    triples: int = HfArg(default=100, help="triples of words in each split of a probe")
    prompts: int = HfArg(default=24, help="held-out prompts")
    n_answers: int = HfArg(default=16, help="answers to each of them in best-of-n and diversity")
    test_pairs: int = HfArg(default=120, help="held-out pairs of polite answers, and of dialogues")
    test_questions: int = HfArg(default=40, help="held-out questions of refusals, in each split")
    reviews: int = HfArg(default=100, help="prompts with two reviews each, for the judge")
    features: int = HfArg(default=10, help="features that the model describes")
    show: bool = HfArg(default=False, help="print the tables of what is kept, and run nothing")
    dry_run: bool = HfArg(
        default=False, help="print every command with its size, in order, and run nothing"
    )

    def __post_init__(self):
        super().__post_init__()
        require(os.path.isdir(self.model), f"--model {self.model}: no such folder")
        for name in ("encoder", "nli_model"):
            folder = getattr(self, name)
            is_there = os.path.isdir(folder) or not folder
            require(is_there, f"--{name} {folder}: no such folder")
        require(not self.sft_flags, "--sft_flags: this study trains no SFT policy")
        at_least(self, 1, "steps", "sums_steps", "rm_ppo_steps", "members", "prompts", "features")


def read_settings(args: list[str] | None = None) -> Settings:
    """The study's flags, read from the command line or a list."""
    return read_flags(Settings, __doc__, args, QUICK)


def main(args=None):
    """Run part by part what is not kept yet, and print each part's tables."""
    a = read_settings(args)
    with cli.errors_in_one_line():
        path = results_file(a, __file__)
        check_model_of_results(a)
        # What is kept can be shown without the files that it was made from.
        if a.show:
            return show_kept(read_cells(path), a)

        parts = cells_of_parts(a)
        if a.dry_run:
            return print_plan(commands_of(parts), a, [])
        check_can_write(path)
        prepare_folder(a)
        for part, stages in parts.items():
            results = {}
            for stage in stages:
                results |= run_cells(stage, a, path)
            print_tables(part, results, a)


def cells_of_parts(a) -> dict[str, Stages]:
    """The cells of each part whose files are given. It prints what is left out."""
    # A part without its files is left out, so that the others can run.
    parts = {}
    for part in a.parts:
        missing = missing_files(a, part)
        if missing:
            print(f"left out: {part}, which needs {missing}")
        else:
            parts[part] = CELLS[part](a)
    if "diversity" in parts and not a.encoder:
        print("left out: embeddings in diversity, which need --encoder")
    return parts


def commands_of(parts: dict[str, Stages]) -> list[list[str]]:
    """The commands of all parts, stage by stage."""
    stages = []
    for cells_of_stages in parts.values():
        for cells in cells_of_stages:
            stages.append([cell.command for cell in cells])
    return stages


def show_kept(kept: dict[str, dict], a):
    """Print the tables of what is kept, however little of a part that is."""
    for part in a.parts:
        results = {}
        for name, entry in kept.items():
            if name.partition("/")[0] == part:
                results[name] = entry["result"]
        print_tables(part, results, a)


def check_model_of_results(a):
    """InputError: another model's results would be kept among those of SmolLM2."""
    # A folder may have any name, so the model is recognised by its sizes.
    config = check_model(a.model).get_text_config()
    sizes = (config.hidden_size, config.num_hidden_layers, config.vocab_size)
    has_own_place = a.quick or (a.results and a.output_dir != Settings.output_dir)
    require(
        sizes == SIZES or has_own_place,
        f"--model {a.model} is not SmolLM2-135M-Instruct, whose results real_models.json keeps: "
        "name a file and a folder of its own, --results and --output_dir",
    )


def prepare_folder(a):
    """Link the models into the study's folder and write its data."""
    os.makedirs(a.output_dir, exist_ok=True)
    for name in ("model", "encoder", "nli_model"):
        folder = getattr(a, name)
        if not folder:
            continue
        link = f"{a.output_dir}/{name}"
        if not os.path.islink(link):
            os.symlink(os.path.abspath(folder), link)
        is_same = os.path.realpath(link) == os.path.realpath(folder)
        require(is_same, f"{link} leads to another folder than --{name} {folder}")
    write_data(a, data_of(a))


if __name__ == "__main__":
    main()
