"""The flags of all scripts and of all commands of probe.py: what --help shows, which values are refused, which defaults are named.

A shared flag is one that a class of nanorlhf/runtime/flags.py declares; all others are a script's own.
"""

import dataclasses
import inspect
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
from nanorlhf.data import FORMATS
from nanorlhf.errors import InputError
from nanorlhf.runtime import cli, flags, hints
from nanorlhf.studies import cue_control, feedback_patterns, generalisation, overoptimisation

FLAG = re.compile(r"^  --(\w+)(?: |$)", re.MULTILINE)
BEYOND = {float: [math.nan, math.inf, -math.inf], int: [2**63, -(2**63) - 1]}


def kinds_of(config_class):
    """{flag: (its type, whether it takes several)}, for `int | None` as for int."""
    kinds = {}
    for name, hint in typing.get_type_hints(config_class).items():
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        kinds[name] = (parts[0] if parts else hint, typing.get_origin(hint) is list)
    return kinds


def is_shared(config_class, name):
    declaring = [c for c in config_class.__mro__ if name in inspect.get_annotations(c)]
    return declaring[-1].__module__ == flags.__name__


def made(name, **settings):
    """A Config made in Python, with what it needs besides."""
    needed = {"mmcs": {"a": ["one", "two"]}, "judge": {"a": ["one"], "b": ["two"]}}
    return CONFIGS[name](**needed.get(name, {}) | settings)


def parsed(name, *args):
    return cli.parse(CONFIGS[name], [*REQUIRED.get(name, []), *args])


# ------------------------------------------------------------------------------------------ --help


@pytest.mark.parametrize("name", CONFIGS)
def test_help(name, capsys, monkeypatch):
    """80 columns, each flag once, own ones before shared ones, choices, and defaults where there are any."""
    monkeypatch.setenv("COLUMNS", "80")
    text, config_class = help_of(name, capsys), CONFIGS[name]
    assert max(map(len, text.splitlines())) <= 80
    assert re.match(r"usage: \S+( \w+)? \[flags\]\n\n\w", text)
    shown = FLAG.findall(text)
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(config_class))
    shared = [is_shared(config_class, flag) for flag in shown]
    assert shared == sorted(shared) and (any(shared) or name == "mmcs")

    parts = dict(zip(shown, FLAG.split(text)[2::2]))
    for field in dataclasses.fields(config_class):
        # A flag's part ends with an empty line if it is the last of its group.
        assert field.metadata["help"]
        words = " ".join(parts[field.name].split("\n\n")[0].split())
        if field.metadata.get("choices"):
            assert words.startswith("{" + ",".join(filter(None, flags.choices_of(field))) + "}")
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if default is dataclasses.MISSING:
            assert words.endswith(" (required)")
        elif default is None or default is False or default in ("", []):
            assert "(default" not in words and "(required" not in words
        else:
            as_typed = " ".join(map(str, default)) if isinstance(default, list) else str(default)
            assert words.endswith(f" (default: {as_typed})")


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_of_help(name, capsys):
    """Each group has a heading, which says what it is for; none is that of a class without a docstring."""
    text = help_of(name, capsys)
    headings = re.findall(r"\n\n(\S.*(?:\n\S.*)*)\n\n  --", text)
    assert headings and len(set(headings)) == len(headings)
    assert not any(heading.startswith(("Config(", "What all groups")) for heading in headings)


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
    kl = text[text.index("\nThe KL penalty: ") : text.index("\nAdvantages and losses: ")]
    assert FLAG.findall(kl) == ["kl_coef", "kl_kind", "kl_in", "kl_target", "kl_horizon"]
    assert FLAG.findall(text)[:2] == ["model", "reward_model"]


@pytest.mark.parametrize(
    "study", [cue_control, feedback_patterns, generalisation, overoptimisation]
)
def test_help_of_studies(study, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        study.read_settings(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and max(map(len, text.splitlines())) <= 80
    assert sorted(FLAG.findall(text)) == sorted(
        field.name for field in dataclasses.fields(study.Settings)
    )
    assert text.index("_flags TEXT") < text.index("\n  --seeds")  # its own first
    with pytest.raises(SystemExit) as exit_:
        study.read_settings(["--seeds", "0"])
    assert exit_.value.code == 2 and capsys.readouterr().err.endswith(
        "error: --seeds must be at least 1, not 0\n"
    )


def test_help_follows_the_width(capsys, monkeypatch):
    for columns, most in (("60", 60), ("90", 90), ("300", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        text = help_of("ppo", capsys)
        flags_of_text = text[text.index("\nScores: ") :]
        assert most - 12 < max(map(len, flags_of_text.splitlines())) <= most


def test_flags_are_also_known_with_hyphens():
    assert parsed("ppo", "--kl-coef", "0.3", "--output-dir", "here").output_dir == "here"
    assert sample_bon.Config(from_files=["a"]) == parsed("bon", "--from", "a")
    assert (
        parsed("sae", "--no_relu")
        == train_sae.Config(relu=False)
        == parsed("sae", "--relu", "False")
    )


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_out_of_range(name):
    """Not a number, infinite, or beyond 64 bits: refused of every numeric flag, in Python and from the command line."""
    numeric = 0
    for field in dataclasses.fields(CONFIGS[name]):
        kind, several = kinds_of(CONFIGS[name])[field.name]
        for value in BEYOND.get(kind, []):
            if value == math.inf and field.metadata.get("may_be_infinite"):
                continue
            with pytest.raises(InputError, match=f"^--{field.name} must [^\n]*$"):
                made(name, **{field.name: [value] if several else value})
            with pytest.raises(InputError, match=f"^--{field.name} must [^\n]*$"):
                parsed(name, f"--{field.name}={value}")
            numeric += 1
    assert numeric or name == "human_latents"


def test_numbers_beyond_what_is_computed_with():
    """float32, the clock of a waiting process, a matrix in memory."""
    for name, flag, value in (
        ("ppo", "lr", "1e39"),
        ("sae", "expansion", "1e30"),
        ("judge", "timeout", "1e30"),
        ("features", "pause", "1e30"),
        ("judge", "requests_per_minute", "1e-30"),
    ):
        with pytest.raises(InputError, match=f"^--{flag} must "):
            parsed(name, f"--{flag}", value)
    with pytest.raises(InputError, match="^--edits 17:set:1e39: it must be"):
        parsed("causal", "--edits", "17:set:1e39")


def test_infinity_where_it_means_something():
    """Bounds that it switches off: their runs are those of a bound that nothing reaches."""
    off = ["max_grad_norm", "clip_range", "value_clip_range", "score_clip", "target_kl"]
    for name in off:
        assert getattr(parsed("ppo", f"--{name}", "inf"), name) == math.inf
    assert parsed("judge", "--requests_per_minute", "inf").requests_per_minute == math.inf
    for config_class in CONFIGS.values():
        for field in dataclasses.fields(config_class):
            if field.metadata.get("may_be_infinite"):
                assert field.name in [*off, "requests_per_minute"]


def test_the_largest_numbers_are_taken():
    assert train_ppo.Config(seed=2**63 - 1).seed == 2**63 - 1
    assert train_sft.Config(eval_every=2**63 - 1).eval_every == 2**63 - 1


# ----------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("name", CONFIGS)
def test_choices(name):
    """All of them are taken as far as one flag goes; any other is refused, in Python and from the command line."""
    kinds, with_choices = kinds_of(CONFIGS[name]), 0
    for field in dataclasses.fields(CONFIGS[name]):
        choices = flags.choices_of(field)
        if choices:
            with_choices += 1
            default = (
                field.default
                if field.default_factory is dataclasses.MISSING
                else field.default_factory()
            )
            assert set(default if isinstance(default, list) else [default]) <= set(choices)
            named = ", ".join(filter(None, choices))
            message = f"^--{field.name} must be one of {re.escape(named)}, not 'another'$"
            with pytest.raises(InputError, match=message):
                made(name, **{field.name: ["another"] if kinds[field.name][1] else "another"})
            with pytest.raises(InputError, match=message):
                parsed(name, f"--{field.name}", "another")
            for choice in choices:
                flags.check_value(field, choice)
    assert with_choices or name == "mmcs"


def test_formats_of_prompts_are_the_readers():
    (field,) = [f for f in dataclasses.fields(flags.SplitFlags) if f.name == "prompt_format"]
    assert set(field.metadata["choices"]) == set(FORMATS)


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if "columns" in CONFIGS[name].__dataclass_fields__]
)
def test_columns_without_an_equals_sign(name):
    with pytest.raises(InputError, match="^--columns takes FIELD=COLUMN$"):
        parsed(name, "--columns", "prompt=question", "prompt")


# ------------------------------------------------------------------------- what is missing by default

SAE = "python train_sae.py --model runs/sft --base none --site residual --layers 2 --normalize token --relu False --output_dir runs/sae_sarm"
SARM = f"{SAE} && python train_rm.py --sarm runs/sae_sarm"


@pytest.mark.parametrize("args, missing, command", [
    (["divergence"], "runs/sft", "python train_sft.py"),
    (["reward"], "runs/ppo", "python train_ppo.py"),
    (["pairs", "--policy", "runs/sft"], "runs/sft", "python train_sft.py"),
    (["features"], "runs/sae/*/*", "python train_sae.py"),
    (["features", "--sae", "runs/sae/policy/3_mlp"], "runs/sae/policy/3_mlp", "python train_sae.py"),
    (["ablate"], "runs/sae/policy/3_mlp", "python train_sae.py"),
    (["mmcs", "--a", "runs/sae/policy/{seed}", "x"], "runs/sae/policy/{seed}", "python train_sae.py"),
    (["reward_features"], "runs/sarm", f"python train_sft.py && {SARM}"),
    (["causal", "--edits", "17:set:0"], "runs/sarm", f"python train_sft.py && {SARM}"),
    (["steer", "--edits", "17:set:0"], "runs/sarm", f"python train_sft.py && {SARM}"),
    (["human_latents"], "runs/sarm", f"python train_sft.py && {SARM}"),
    (["evaluate", "--reward_model", "runs/rm/seed_0"], "runs/rm/seed_0", "python train_rm.py"),
    (["judge", "--a", "runs/ppo/eval/step_60.jsonl", "--b", "x"], "runs/ppo/eval/step_60.jsonl", "python train_ppo.py"),
])  # fmt: skip
def test_hints(tmp_path, monkeypatch, capfd, args, missing, command):
    """Where a default is missing, the error names the commands that make it, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert f": error: {missing}: no such run yet: {command} makes it\n" in probe_refused(
        capfd, *args
    )
    assert not list(tmp_path.iterdir())


def test_hints_leave_out_what_is_there(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sft").mkdir(parents=True)
    assert f"runs/sarm: no such run yet: {SARM} makes it" in probe_refused(capfd, "reward_features")
    (tmp_path / "runs/sae_sarm").mkdir()
    assert (
        "runs/sarm: no such run yet: python train_rm.py --sarm runs/sae_sarm makes it"
        in probe_refused(capfd, "reward_features")
    )
    (tmp_path / "runs/sarm").mkdir()
    assert "makes it" not in probe_refused(capfd, "reward_features")


def test_a_sarm_without_its_autoencoder_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        train_rm, "train_what_is_missing", lambda *args: pytest.fail("it was trained")
    )
    for more in ([], ["--members", "2"]):
        config = parsed("rm", "--sarm", "runs/sae_sarm", *more)
        with pytest.raises(
            InputError,
            match=re.escape(
                f"runs/sae_sarm: no such run yet: python train_sft.py && {SAE} makes it"
            ),
        ):
            train_rm.main(config)


def test_hints_are_commands_that_make_what_they_say():
    """Pasted as they are; and they agree with what the scripts train by themselves."""
    for folder, command in hints.MADE_BY.items():
        _, config = parse_command(command.removeprefix("python "))
        assert config.output_dir == folder
    for folder, script in stages.SCRIPT_OF.items():
        assert hints.MADE_BY[folder] == f"python {script}.py"
