"""What comes with a model folder is data: its code never runs, its pickles are never read, and its index does not lead elsewhere.

Every door that loads something is tried with a folder whose evil.py, or whose pickle, leaves a mark when it runs.
"""

import ast
import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    ENV,
    REPO,
    arguments,
    public_checkpoint,
    refused,
    tiny_lm,
    tiny_policy,
    word_tokenizer,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.evals.encoders import check_nli, nli_scorer, sentence_encoder
from nanorlhf.hf.folders import check_model
from nanorlhf.interp.explainer import local_asker
from nanorlhf.models import load_policy, load_reward_model, load_tokenizer, save_policy
from nanorlhf.rewards import check_reward, load_reward
from nanorlhf.runtime.distributed import Dist
from nanorlhf.sarm import SARM

ALONE = Dist(0, 1, torch.device("cpu"))
INDEX = "model.safetensors.index.json"
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")


def write_json(path, value):
    Path(path).write_text(json.dumps(value))


# ------------------------------------------------------------------------------------------------------------------------- code


def add_evil_code(folder, mark):
    """evil.py, which writes the file `mark` when it is imported, and a config.json and tokenizer_config.json that name it."""
    Path(folder, "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads(Path(folder, "config.json").read_text())
    write_json(
        Path(folder, "config.json"),
        config | {"auto_map": {name: "evil.Evil" for name in CLASSES[1:]}},
    )


@pytest.fixture
def mamba(here, tmp_path):  # noqa: F811
    """A Mamba policy that transformers knows, whose folder brings code of its own for the classifier that transformers lacks."""
    tokenizer = world.tokenizer()
    torch.manual_seed(0)
    MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    ).save_pretrained("mamba")
    tokenizer.save_pretrained("mamba")
    add_evil_code("mamba", tmp_path / "mark")
    return tmp_path / "mark"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, changes", [("rm", {"model": "mamba"}), ("ppo", {"reward_model": "mamba"})]
)
def test_a_real_process_neither_runs_it_nor_asks(mamba, kind, changes):
    """`yes |` would answer the library's question "Do you wish to run the custom code? [y/N]"."""
    command = [sys.executable, REPO / f"train_{kind}.py", *arguments(kind, **changes)]
    done = subprocess.run(
        command, env=ENV, input="y\n" * 1000, capture_output=True, text=True, timeout=120
    )
    assert not mamba.exists()
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and "error: mamba: " in done.stderr
    ), done.stderr
    assert "[y/N]" not in done.stdout and "custom code" not in done.stdout


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder whose model type has a config in transformers and no class for any task; asking and running both fail the test."""
    folder = tmp_path / "evil"
    LlamaForCausalLM(tiny_lm("llama").config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    AutoConfig.for_model("clap_text_model", vocab_size=60, num_hidden_layers=1).save_pretrained(
        folder
    )
    add_evil_code(folder, tmp_path / "mark")
    monkeypatch.setattr(
        builtins, "input", lambda *args: pytest.fail("transformers asked a question")
    )
    yield folder
    assert not (tmp_path / "mark").exists()


DOORS = {
    "policy": load_policy,
    "value model": lambda path: load_policy(value_model_of(path)),
    "reward model": load_reward_model,
    "new reward model": lambda path: load_reward_model(path, seed=0),
    "reward": lambda path: load_reward(path, None, ALONE),
    "sentence encoder": sentence_encoder,
    "NLI model": nli_scorer,
    "SARM": SARM.from_pretrained,
    "explainer": lambda path: local_asker(path, "cpu"),
    "adapter": lambda path: load_policy(adapter_on(path)),
}


def value_model_of(path):
    """A good policy's folder in which this model is the separate value model."""
    policy = path + "_with_values"
    save_policy(tiny_policy("llama", value_head=False), word_tokenizer(), policy)
    shutil.copytree(path, os.path.join(policy, "value_model"))
    return policy


def adapter_on(path):
    """A LoRA adapter of this base model."""
    adapter = Path(path + "_adapter")
    adapter.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(path)}  # fmt: skip
    write_json(adapter / "adapter_config.json", config)
    save_file(
        {"base_model.model.q_proj.lora_A.weight": torch.zeros(1)},
        adapter / "adapter_model.safetensors",
    )
    return str(adapter)


def settings_for(folder, door):
    """What a door looks at before it loads: labels of an NLI model, the parameters of a SARM."""
    config = json.loads((folder / "config.json").read_text())
    if door == "NLI model":
        config |= {"id2label": {"0": "contradiction", "1": "neutral", "2": "entailment"}}
        config |= {"label2id": {"contradiction": 0, "neutral": 1, "entailment": 2}}
    if door == "SARM":
        config |= {"sarm_param": {"sae_source_layer": 1, "sae_latent_size": 8, "sae_k": 2}}
    write_json(folder / "config.json", config)


@pytest.mark.parametrize("door", DOORS)
def test_code_at_every_door(evil, door, capfd):
    settings_for(evil, door)
    with pytest.raises(ValueError, match="custom code|Unrecognized configuration class"):
        DOORS[door](str(evil))
    assert capfd.readouterr() == ("", "")  # transformers says nothing of its own


def test_code_of_a_config_and_of_a_tokenizer(evil):
    config = json.loads((evil / "config.json").read_text())
    write_json(
        evil / "config.json",
        config | {"model_type": "evil", "auto_map": {name: "evil.Evil" for name in CLASSES}},
    )
    for door in (check_model, check_reward, check_nli, load_policy):
        with pytest.raises(InputError, match="evil: neither a model folder"):
            door(str(evil))
    write_json(
        evil / "tokenizer_config.json",
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    )
    with pytest.raises(InputError, match="evil: no tokenizer could be loaded"):
        load_tokenizer(str(evil))


def product_files():
    return sorted([*REPO.glob("*.py"), *REPO.glob("nanorlhf/**/*.py")])


@pytest.mark.parametrize("path", product_files(), ids=lambda path: path.name)
def test_the_source_trusts_nothing(path):
    """At every from_pretrained and from_config of a transformers Auto class stands trust_remote_code=False; nothing reads a pickle."""
    ours = ("SARM", "cls")  # a method of this project
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            assert not names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, (
                f"{path}:{node.lineno}"
            )
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        keywords = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        receiver = getattr(node.func.value, "id", "")
        if node.func.attr in ("from_pretrained", "from_config") and receiver not in ours:
            assert keywords.get("trust_remote_code") is False, f"{path}:{node.lineno}"
        if (receiver, node.func.attr) == ("torch", "load"):
            assert keywords.get("weights_only") is True, f"{path}:{node.lineno}"


# ---------------------------------------------------------------------------------------------------------------------- weights


class Mark:
    """What leaves a mark when its pickle is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def sharded(folder):
    """A policy in two safetensors files with their index, as transformers writes it. -> its logits on a text"""
    lm = tiny_lm("llama")
    lm.save_pretrained(folder, max_shard_size="20KB")
    word_tokenizer().save_pretrained(folder)
    assert (Path(folder) / INDEX).exists() and not (Path(folder) / "model.safetensors").exists()
    return lm(input_ids=torch.tensor([[5, 6, 7]])).logits


def test_a_good_index(tmp_path):
    """Shards beside their index load as ever; so they do through the links that the hub's cache consists of."""
    expected = sharded(tmp_path / "model")
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "model").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    for folder in ("model", "links"):
        policy = load_policy(str(tmp_path / folder), value_head=False)
        assert policy.lm(input_ids=torch.tensor([[5, 6, 7]])).logits.equal(expected)


WRONG = {  # what the index says of one tensor, and what is said of that
    "pytorch_model.bin": "never from a pickle",
    "model.safetensors.bin": "never from a pickle",
    "../other/model.safetensors": "outside the model's own folder",
    "{absolute}": "outside the model's own folder",
    "sub/../../other/model.safetensors": "outside the model's own folder",
    "sub/model.safetensors": "outside the model's own folder",
    "lost.safetensors": "no such file",
    5: "must be a name, not 5",
    None: "must be a name, not None",
}


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Another model's weights, as safetensors and as a pickle that leaves a mark; nothing may load any of them."""
    tiny_lm("llama", seed=1).save_pretrained(tmp_path / "other")
    for name in ("pytorch_model.bin", "model.safetensors.bin", "adapter_model.bin"):
        torch.save({"x": Mark(str(tmp_path / "mark"))}, tmp_path / "other" / name)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    yield tmp_path / "other"
    assert not (tmp_path / "mark").exists()


def spoil(folder, other, name):
    """Let the index of a sharded model put its embeddings into the file `name`, which is there."""
    for file in other.glob("*.bin"):
        shutil.copy(file, folder)
    (folder / "sub").mkdir(exist_ok=True)
    shutil.copy(other / "model.safetensors", folder / "sub")
    index = json.loads((folder / INDEX).read_text())
    tensor = next(name for name in index["weight_map"] if "embed" in name)
    index["weight_map"][tensor] = (
        name.format(absolute=other / "model.safetensors") if isinstance(name, str) else name
    )
    write_json(folder / INDEX, index)
    save_file({}, folder / "x.safetensors")


@pytest.mark.parametrize("name", WRONG, ids=str)
def test_an_index_that_leads_elsewhere(tmp_path, other, name):
    """Refused by check_model, which runs before anything is loaded, and so at each door behind it."""
    sharded(tmp_path / "model")
    spoil(tmp_path / "model", other, name)
    for door in (check_model, check_reward, load_policy):
        with pytest.raises(InputError) as refusal:
            door(str(tmp_path / "model"))
        assert WRONG[name] in str(refusal.value) and INDEX in str(refusal.value)


@pytest.mark.parametrize("door", DOORS)
def test_a_pickle_at_every_door(tmp_path, other, door):
    folder = tmp_path / "model"
    sharded(folder)
    spoil(folder, other, "pytorch_model.bin")
    settings_for(folder, door)
    with pytest.raises(InputError, match="never from a pickle"):
        DOORS[door](str(folder))


def test_a_value_model_is_looked_at_with_its_policy(tmp_path, other):
    folder = tmp_path / "model"
    sharded(folder)
    spoil(folder, other, "../other/model.safetensors")
    with pytest.raises(InputError, match="value_model.*outside the model's own folder"):
        check_model(value_model_of(str(folder)))


def test_a_pickled_adapter(tmp_path, other):
    sharded(tmp_path / "model")
    adapter = Path(adapter_on(str(tmp_path / "model")))
    os.remove(adapter / "adapter_model.safetensors")
    shutil.copy(other / "adapter_model.bin", adapter)
    with pytest.raises(InputError, match="an adapter without adapter_model.safetensors"):
        check_model(str(adapter))


def test_a_sarm_in_several_files(tmp_path, other):
    """A good one loads; one whose index names a pickle, or another folder's file, is refused before that."""
    _, tensors = public_checkpoint(tmp_path / "sarm", shards=2)
    assert SARM.from_pretrained(str(tmp_path / "sarm")).score.weight.equal(tensors["score.weight"])
    good = json.loads((tmp_path / "sarm" / INDEX).read_text())
    shutil.copy(other / "pytorch_model.bin", tmp_path / "sarm")
    for name in (
        "pytorch_model.bin",
        "../other/model.safetensors",
        str(other / "model.safetensors"),
    ):
        write_json(
            tmp_path / "sarm" / INDEX,
            good | {"weight_map": good["weight_map"] | {"score.weight": name}},
        )
        for door in (check_reward, SARM.from_pretrained):
            with pytest.raises(
                InputError, match="never from a pickle|outside the model's own folder"
            ):
                door(str(tmp_path / "sarm"))


@pytest.mark.parametrize(
    "text", ["{oops", "[]", "5", "{}", '{"weight_map": []}', '{"weight_map": {}}']
)
def test_what_is_no_index(tmp_path, text):
    sharded(tmp_path / "model")
    public_checkpoint(tmp_path / "sarm", shards=2)
    for folder, doors in (
        ("model", (check_model, load_policy)),
        ("sarm", (check_reward, SARM.from_pretrained)),
    ):
        (tmp_path / folder / INDEX).write_text(text)
        for door in doors:
            with pytest.raises(InputError, match=INDEX):
                door(str(tmp_path / folder))


def test_an_index_beside_whole_weights(tmp_path, other):
    """model.safetensors would be read, and the index not; it is refused all the same."""
    sharded(tmp_path / "model")
    spoil(tmp_path / "model", other, "pytorch_model.bin")
    tiny_lm("llama").save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "model")
    with pytest.raises(InputError, match="never from a pickle"):
        check_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "x.safetensors",
        "x.safetensors.index.json",
        "../other/model.safetensors",
    ],
)
def test_a_config_that_names_the_file_of_weights(tmp_path, other, name):
    """transformers_weights of config.json takes the place of model.safetensors, and may be a pickle of that one name."""
    folder = tmp_path / "model"
    tiny_lm("llama").save_pretrained(folder)
    shutil.copy(other / "adapter_model.bin", folder)
    shutil.copy(other / "model.safetensors", folder / "x.safetensors")
    write_json(
        folder / "x.safetensors.index.json",
        {"metadata": {}, "weight_map": {"lm_head.weight": "adapter_model.bin"}},
    )
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"transformers_weights": name})
    for door in (check_model, load_policy):
        with pytest.raises(InputError, match="transformers_weights"):
            door(str(folder))


def test_weights_of_another_name_are_none(tmp_path):
    """An empty x.safetensors is no model's weights; nor is the value head."""
    lm = AutoModelForCausalLM.from_config(tiny_lm("llama").config)
    lm.save_pretrained(tmp_path / "model")
    os.rename(tmp_path / "model/model.safetensors", tmp_path / "model/x.safetensors")
    save_file({}, tmp_path / "model/value_head.safetensors")
    with pytest.raises(InputError, match="no weights"):
        check_model(str(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_the_scripts_refuse_a_pickle(here, capfd, kind):  # noqa: F811
    """The smallest case: an index that names pytorch_model.bin, and an empty x.safetensors beside it."""
    tensors = load_file("model/model.safetensors")
    os.remove("model/model.safetensors")
    torch.save(tensors, "model/pytorch_model.bin")
    write_json(
        f"model/{INDEX}",
        {"metadata": {}, "weight_map": {name: "pytorch_model.bin" for name in tensors}},
    )
    save_file({}, "model/x.safetensors")
    refused(
        capfd,
        kind,
        arguments(kind),
        f"model/{INDEX}: ",
        "is in pytorch_model.bin",
        "never from a pickle",
    )
