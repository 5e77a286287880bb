"""The flags of all scripts and of all commands of probe.py.

What --help shows, which values are refused, which defaults are named. A shared flag is one that a
class of nanorlhf/runtime/flags.py declares; all others are a script's own.
"""

import dataclasses
import functools
import inspect
import json
import math
import re
import typing

import pytest
from support import CONFIGS, REQUIRED, help_of, parse_command, probe_refused

import probe
import sample_bon
import train_ppo
import train_rm
import train_sae
import train_sft
from nanorlhf import stages
from nanorlhf.errors import InputError
from nanorlhf.formats import PROMPT_FORMATS
from nanorlhf.runtime import cli, flags, hints
from nanorlhf.studies import cue_control, feedback_patterns, generalisation, overoptimisation

FLAG = re.compile(r"^  --(\w+)(?: |$)", re.MULTILINE)


# ------------------------------------------------------------------ what a Config says of its flags


@functools.cache
def type_hints(config_class):
    """{flag: its type}. Kept, because it takes a while to find out."""
    return typing.get_type_hints(config_class)


def takes_several(config_class, name):
    """Whether a flag is followed by a list of values."""
    hint = type_hints(config_class)[name]
    return typing.get_origin(hint) is list


def kind_of(config_class, name):
    """The type of a flag's value, of each one in a list; for `int | None` it is int."""
    hint = type_hints(config_class)[name]
    for part in typing.get_args(hint):
        if part is not type(None):
            return part
    return hint


def default_of(field):
    """A flag's default; MISSING where the flag is required."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def as_list(value):
    if isinstance(value, list):
        return value
    return [value]


def is_shared(config_class, name):
    """Whether the first class that declares a flag is one of flags.py."""
    declaring = [c for c in config_class.__mro__ if name in inspect.get_annotations(c)]
    return declaring[-1].__module__ == flags.__name__


def field_names(config_class):
    return [field.name for field in dataclasses.fields(config_class)]


# What some commands need besides.
NEEDED = {"mmcs": {"a": ["one", "two"]}, "judge": {"a": ["one"], "b": ["two"]}}


def make_config(name, **settings):
    """A Config made in Python."""
    return CONFIGS[name](**{**NEEDED.get(name, {}), **settings})


def make_config_with(name, flag, value):
    """A Config made in Python, with one flag's value."""
    if takes_several(CONFIGS[name], flag):
        value = [value]
    return make_config(name, **{flag: value})


def parse(name, *args):
    """A Config from a command line."""
    return cli.parse(CONFIGS[name], [*REQUIRED.get(name, []), *args])


# ------------------------------------------------------------------------------------------- --help


def longest_line(text):
    return max(len(line) for line in text.splitlines())


def words_of_flags(text):
    """{flag: what --help says of it, in one line}."""
    _, *parts = FLAG.split(text)
    words = {}
    for flag, part in zip(parts[::2], parts[1::2], strict=True):
        # The part of the last flag of a group ends with an empty line.
        own, *_ = part.split("\n\n")
        words[flag] = " ".join(own.split())
    return words


def is_nothing(default):
    """Whether a default means that nothing is given, and so is not named. 0 is a number."""
    return default is None or default is False or default in ("", [])


def end_of_help(field):
    """How the help of a flag must end, which has a default or is required."""
    default = default_of(field)
    if default is dataclasses.MISSING:
        return " (required)"
    if isinstance(default, list):
        default = " ".join(str(value) for value in default)
    return f" (default: {default})"


@pytest.mark.parametrize("name", CONFIGS)
def test_help(name, capsys, monkeypatch):
    """80 columns, each flag once, a script's own flags before shared ones."""
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(name, capsys)
    assert longest_line(text) <= 80
    assert re.match(r"usage: \S+( \w+)? \[flags\]\n\n\w", text)

    shown = FLAG.findall(text)
    assert sorted(shown) == sorted(field_names(CONFIGS[name]))
    shared = [is_shared(CONFIGS[name], flag) for flag in shown]
    assert shared == sorted(shared)
    assert any(shared) or name == "mmcs"


@pytest.mark.parametrize("name", CONFIGS)
def test_help_names_choices_and_defaults(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = words_of_flags(help_of(name, capsys))
    for field in dataclasses.fields(CONFIGS[name]):
        assert field.metadata["help"]
        said = words[field.name]
        if field.metadata.get("choices"):
            named = [choice for choice in flags.choices_of(field) if choice]
            assert said.startswith("{" + ",".join(named) + "}")
        if is_nothing(default_of(field)):
            assert "(default" not in said
            assert "(required" not in said
        else:
            assert said.endswith(end_of_help(field))


def test_help_shows_what_a_switch_takes(capsys):
    """Its name alone turns a switch on; one that is on has to be told False."""
    words = words_of_flags(help_of("sae", capsys))
    assert words["relu"].startswith("{True,False} topk:")
    assert words["resume"].startswith("continue the run")


@pytest.mark.parametrize("name", CONFIGS)
def test_each_group_of_help_has_a_heading_of_its_own(name, capsys):
    """It says what the group is for; none is that of a class without a docstring."""
    text = help_of(name, capsys)
    headings = re.findall(r"\n\n(\S.*(?:\n\S.*)*)\n\n  --", text)
    assert headings
    assert len(set(headings)) == len(headings)
    for heading in headings:
        assert not heading.startswith(("Config(", "What all groups"))


@pytest.mark.parametrize("name", [name for name in probe.COMMANDS if name != "human_latents"])
def test_help_of_probe_names_what_controls_rule_out_and_what_would_refute(name, capsys):
    """Five sentences below the first line; human_latents measures nothing."""
    _, _, explanation, *_ = help_of(name, capsys).split("\n\n")
    sentences = re.split(r"(?<=\.)\s+(?=[A-Z])", explanation.strip())

    measures, *controls, refutes = sentences
    assert len(sentences) == 5
    assert measures.startswith("It measures")
    assert sum("rule" in sentence and "out" in sentence for sentence in controls) >= 2
    assert refutes.startswith("What would refute")


def test_ppo_has_its_own_flags_in_groups(capsys):
    text = help_of("ppo", capsys)
    start = text.index("\nThe KL penalty: ")
    end = text.index("\nAdvantages and losses: ")
    kl_flags = FLAG.findall(text[start:end])
    assert kl_flags == ["kl_coef", "kl_kind", "kl_in", "kl_target", "kl_horizon"]
    assert FLAG.findall(text)[:2] == ["model", "reward_model"]


STUDIES = pytest.mark.parametrize(
    "study", [cue_control, feedback_patterns, generalisation, overoptimisation]
)


@STUDIES
def test_help_of_a_study(study, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        study.read_settings(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert longest_line(text) <= 80
    assert sorted(FLAG.findall(text)) == sorted(field_names(study.Settings))
    # Its own flags come first.
    assert text.index("_flags TEXT") < text.index("\n  --seeds")


@STUDIES
def test_a_bad_flag_of_a_study(study, capsys):
    with pytest.raises(SystemExit) as end:
        study.read_settings(["--seeds", "0"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith("error: --seeds must be at least 1, not 0\n")


@pytest.mark.parametrize("columns, most", [("60", 60), ("90", 90), ("300", 100)])
def test_help_follows_the_width_of_the_screen(capsys, monkeypatch, columns, most):
    monkeypatch.setenv("COLUMNS", columns)
    text = help_of("ppo", capsys)
    of_flags = text[text.index("\nScores: ") :]
    assert most - 12 < longest_line(of_flags) <= most


def test_flags_are_also_known_with_hyphens():
    config = parse("ppo", "--kl-coef", "0.3", "--output-dir", "here")
    assert config.kl_coef == 0.3
    assert config.output_dir == "here"


def test_from_is_known_by_its_name_in_python_too():
    """`from` is no name that Python would take."""
    assert parse("bon", "--from", "a") == sample_bon.Config(from_files=["a"])


@pytest.mark.parametrize("args", [["--no_relu"], ["--relu", "False"]])
def test_a_flag_can_be_switched_off(args):
    assert parse("sae", *args) == train_sae.Config(relu=False)


# ------------------------------------------------------------------------------------------ numbers

# Not a number, infinite, or beyond 64 bits.
OUT_OF_RANGE = {float: [math.nan, math.inf, -math.inf], int: [2**63, -(2**63) - 1]}


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_out_of_range(name):
    """They are refused of every numeric flag, in Python and from the command line."""
    refused = 0
    for field in dataclasses.fields(CONFIGS[name]):
        for value in OUT_OF_RANGE.get(kind_of(CONFIGS[name], field.name), []):
            if value == math.inf and field.metadata.get("may_be_infinite"):
                continue
            in_one_line = f"^--{field.name} must [^\n]*$"
            with pytest.raises(InputError, match=in_one_line):
                make_config_with(name, field.name, value)
            with pytest.raises(InputError, match=in_one_line):
                parse(name, f"--{field.name}={value}")
            refused += 1
    assert refused > 0 or name == "human_latents"


@pytest.mark.parametrize(
    "name, flag, value",
    [
        # float32
        ("ppo", "lr", "1e39"),
        # a matrix in memory
        ("sae", "expansion", "1e30"),
        # the clock of a waiting process
        ("judge", "timeout", "1e30"),
        ("features", "pause", "1e30"),
        ("judge", "requests_per_minute", "1e-30"),
    ],
)
def test_numbers_beyond_what_is_computed_with(name, flag, value):
    with pytest.raises(InputError, match=f"^--{flag} must "):
        parse(name, f"--{flag}", value)


def test_an_edit_beyond_float32():
    with pytest.raises(InputError, match="^--edits 17:set:1e39: it must be"):
        parse("causal", "--edits", "17:set:1e39")


# Bounds that infinity switches off: their runs are those of a bound that nothing reaches.
BOUNDS = [
    "max_grad_norm",
    "clip_range",
    "clip_range_high",
    "value_clip_range",
    "score_clip",
    "target_kl",
]


@pytest.mark.parametrize("flag", BOUNDS)
def test_a_bound_may_be_infinite(flag):
    assert getattr(parse("ppo", f"--{flag}", "inf"), flag) == math.inf


def test_a_rate_may_be_infinite():
    assert parse("judge", "--requests_per_minute", "inf").requests_per_minute == math.inf


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_else_may_be_infinite(name):
    for field in dataclasses.fields(CONFIGS[name]):
        if field.metadata.get("may_be_infinite"):
            assert field.name in [*BOUNDS, "requests_per_minute"]


def test_the_largest_numbers_are_taken():
    largest = 2**63 - 1
    assert train_ppo.Config(seed=largest).seed == largest
    assert train_sft.Config(eval_every=largest).eval_every == largest


# ------------------------------------------------------------------------------------------ choices


@pytest.mark.parametrize("name", CONFIGS)
def test_choices(name):
    """All of them are taken as far as one flag goes.

    Any other is refused, in Python and from the command line.
    """
    with_choices = 0
    for field in dataclasses.fields(CONFIGS[name]):
        choices = flags.choices_of(field)
        if not choices:
            continue
        with_choices += 1
        for choice in choices:
            flags.check_value(field, choice)
        assert set(as_list(default_of(field))) <= set(choices)

        named = ", ".join(choice for choice in choices if choice)
        message = f"^--{field.name} must be one of {re.escape(named)}, not 'another'$"
        with pytest.raises(InputError, match=message):
            make_config_with(name, field.name, "another")
        with pytest.raises(InputError, match=message):
            parse(name, f"--{field.name}", "another")
    assert with_choices > 0 or name == "mmcs"


def test_formats_of_prompts_are_those_that_can_be_read():
    (field,) = [f for f in dataclasses.fields(flags.SplitFlags) if f.name == "prompt_format"]
    assert set(field.metadata["choices"]) == {"", *PROMPT_FORMATS}


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if "columns" in field_names(CONFIGS[name])]
)
def test_columns_that_say_nothing_or_two_things(name):
    for column in ("prompt", "=question"):
        with pytest.raises(InputError, match="^--columns takes FIELD=COLUMN$"):
            parse(name, "--columns", "prompt=question", column)
    with pytest.raises(InputError, match="^--columns names prompt twice$"):
        parse(name, "--columns", "prompt=a", "prompt=b")


# ----------------------------------------------------------------------- what is missing by default

SFT = "python train_sft.py"
SAE = (
    "python train_sae.py --model runs/sft --base none --site residual --layers 2 "
    "--normalize token --relu False --output_dir runs/sae_sarm"
)
SARM = f"{SAE} && python train_rm.py --sarm runs/sae_sarm"


@pytest.mark.parametrize(
    "args, missing, command",
    [
        ("divergence", "runs/sft", SFT),
        ("reward", "runs/ppo", "python train_ppo.py"),
        ("pairs --policy runs/sft", "runs/sft", SFT),
        ("features", "runs/sae/*/*", "python train_sae.py"),
        (
            "features --sae runs/sae/policy/3_mlp",
            "runs/sae/policy/3_mlp",
            "python train_sae.py",
        ),
        ("ablate", "runs/sae/policy/3_mlp", "python train_sae.py"),
        (
            "mmcs --a runs/sae/policy/{seed} x",
            "runs/sae/policy/{seed}",
            "python train_sae.py",
        ),
        ("reward_features", "runs/sarm", f"{SFT} && {SARM}"),
        ("causal --edits 17:set:0", "runs/sarm", f"{SFT} && {SARM}"),
        ("steer --edits 17:set:0", "runs/sarm", f"{SFT} && {SARM}"),
        ("human_latents", "runs/sarm", f"{SFT} && {SARM}"),
        ("evaluate --reward_model runs/rm/seed_0", "runs/rm/seed_0", "python train_rm.py"),
        (
            "judge --a runs/ppo/eval/step_40.jsonl --b x",
            "runs/ppo/eval/step_40.jsonl",
            "python train_ppo.py",
        ),
    ],
)
def test_where_a_default_is_missing_the_commands_are_named_that_make_it(
    tmp_path, monkeypatch, capfd, args, missing, command
):
    monkeypatch.chdir(tmp_path)
    error = probe_refused(capfd, *args.split())
    assert f": error: {missing}: no such run yet: {command} makes it\n" in error
    assert not list(tmp_path.iterdir())


def test_commands_are_left_out_whose_runs_are_there(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sft").mkdir(parents=True)
    error = probe_refused(capfd, "reward_features")
    assert f"runs/sarm: no such run yet: {SARM} makes it" in error

    (tmp_path / "runs/sae_sarm").mkdir()
    error = probe_refused(capfd, "reward_features")
    last_command = "python train_rm.py --sarm runs/sae_sarm"
    assert f"runs/sarm: no such run yet: {last_command} makes it" in error

    (tmp_path / "runs/sarm").mkdir()
    assert "makes it" not in probe_refused(capfd, "reward_features")


@pytest.mark.parametrize("more", [[], ["--members", "2"]], ids=["alone", "members"])
def test_a_sarm_without_its_autoencoder_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch, more
):
    def train_what_is_missing(*args):
        pytest.fail("it was trained")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_rm, "train_what_is_missing", train_what_is_missing)
    config = parse("rm", "--sarm", "runs/sae_sarm", *more)
    with pytest.raises(InputError) as raised:
        train_rm.main(config)
    hint = f"runs/sae_sarm: no such run yet: {SFT} && {SAE} makes it"
    assert hint in str(raised.value)


@pytest.mark.parametrize("folder", hints.MADE_BY)
def test_a_command_makes_what_the_hint_says(folder):
    """It can be pasted as it is."""
    command = hints.MADE_BY[folder]
    _, config = parse_command(command.removeprefix("python "))
    assert config.output_dir == folder


@pytest.mark.parametrize("folder", stages.SCRIPT_OF)
def test_hints_agree_with_what_the_scripts_train_by_themselves(folder):
    assert hints.MADE_BY[folder] == f"python {stages.SCRIPT_OF[folder]}.py"


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
@pytest.mark.parametrize(
    "words", [["--lora_alpha", "3"], ["--lora_dropout", "0.1"], ["--lora_layers", "x"]]
)
def test_flags_of_adapters_need_adapters(name, words):
    with pytest.raises(InputError, match=f"^without --lora_rank nothing reads {words[0]}$"):
        parse(name, *words)
    parse(name, *words, "--lora_rank", "2", "--model", "m")


def test_a_run_that_is_resumed_has_its_own_settings_for_defaults(tmp_path):
    settings = {"lr": 0.5, "steps": 7, "output_dir": "where it was", "a flag that is gone": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = parse("sft", "--resume", "--output_dir", str(tmp_path), "--steps", "9")
    assert (config.lr, config.steps, config.output_dir) == (0.5, 9, str(tmp_path))
    # Without --resume what is in the folder says nothing.
    assert parse("sft", "--output_dir", str(tmp_path)).lr == train_sft.Config().lr
