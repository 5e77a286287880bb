"""What comes with a model folder is data.

Its code never runs, its pickles are never read, and its index does not lead elsewhere. Every door
that loads something is tried with a folder whose evil.py, or whose pickle, leaves a mark when it
runs.
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
from support import ALL_SCRIPTS, ENV, REPO, arguments, refused
from tiny_models import public_checkpoint, tiny_lm, tiny_policy, word_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import probe
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


def write_json(path, value):
    Path(path).write_text(json.dumps(value))


def change_config(folder, **changes):
    """Put these settings into a model folder's config.json."""
    path = Path(folder) / "config.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


# ---------------------------------------------------------------------------------------- the doors


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
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(path),
    }
    write_json(adapter / "adapter_config.json", config)
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.zeros(1)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    return str(adapter)


def load_value_model(path):
    return load_policy(value_model_of(path))


def load_new_reward_model(path):
    return load_reward_model(path, seed=0)


def load_any_reward(path):
    return load_reward(path, None, ALONE)


def load_explainer(path):
    return local_asker(path, "cpu")


def load_adapter(path):
    return load_policy(adapter_on(path))


# {what is loaded: how}
DOORS = {
    "policy": load_policy,
    "value model": load_value_model,
    "reward model": load_reward_model,
    "new reward model": load_new_reward_model,
    "reward": load_any_reward,
    "sentence encoder": sentence_encoder,
    "NLI model": nli_scorer,
    "SARM": SARM.from_pretrained,
    "explainer": load_explainer,
    "adapter": load_adapter,
}


def prepare_for(door, folder):
    """Give a folder what a door looks at before it loads.

    That is labels for an NLI model, and the parameters of a SARM.
    """
    if door == "NLI model":
        labels = ["contradiction", "neutral", "entailment"]
        id2label = {str(i): label for i, label in enumerate(labels)}
        label2id = {label: i for i, label in enumerate(labels)}
        change_config(folder, id2label=id2label, label2id=label2id)
    if door == "SARM":
        sarm_param = {"sae_source_layer": 1, "sae_latent_size": 8, "sae_k": 2}
        change_config(folder, sarm_param=sarm_param)


# --------------------------------------------------------------------------------------------- code

EVIL_CONFIG = {"AutoConfig": "evil.Evil"}
EVIL_MODELS = {
    "AutoModel": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoModelForSequenceClassification": "evil.Evil",
}


def add_evil_code(folder, mark):
    """Put an evil.py into a folder, and into its config.json that its models are defined there.

    evil.py writes the file `mark` when it is imported.
    """
    Path(folder, "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    change_config(folder, auto_map=EVIL_MODELS)


@pytest.fixture
def mamba(here, tmp_path):
    """A Mamba policy, which transformers knows, with code for the classifier that it lacks.

    Returns the mark that the code would leave.
    """
    tokenizer = world.tokenizer()
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4
    )
    MambaForCausalLM(config).save_pretrained("mamba")
    tokenizer.save_pretrained("mamba")
    add_evil_code("mamba", tmp_path / "mark")
    return tmp_path / "mark"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, changes", [("rm", {"model": "mamba"}), ("ppo", {"reward_model": "mamba"})]
)
def test_a_real_process_neither_runs_code_nor_asks_whether_it_may(mamba, kind, changes):
    """`yes |` would answer the library's question "Do you wish to run the custom code? [y/N]"."""
    done = subprocess.run(
        [sys.executable, REPO / f"train_{kind}.py", *arguments(kind, **changes)],
        env=ENV,
        input="y\n" * 1000,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not mamba.exists()
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "error: mamba: " in done.stderr
    assert "[y/N]" not in done.stdout
    assert "custom code" not in done.stdout


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder whose model type has a config in transformers, and no class for any task.

    Asking fails the test, and so does running the code.
    """

    def ask(*args):
        pytest.fail("transformers asked a question")

    folder = tmp_path / "evil"
    LlamaForCausalLM(tiny_lm("llama").config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = AutoConfig.for_model("clap_text_model", vocab_size=60, num_hidden_layers=1)
    config.save_pretrained(folder)
    add_evil_code(folder, tmp_path / "mark")
    monkeypatch.setattr(builtins, "input", ask)
    yield folder
    assert not (tmp_path / "mark").exists()


# To refuse a SARM transformers imports the configs of all its models.
EVERY_DOOR = [door for door in DOORS if door != "SARM"]
EVERY_DOOR.append(pytest.param("SARM", marks=pytest.mark.slow))


@pytest.mark.parametrize("door", EVERY_DOOR)
def test_code_at_every_door(evil, door, capfd):
    """It is refused, and transformers says nothing of its own."""
    prepare_for(door, evil)
    with pytest.raises(ValueError, match="custom code|Unrecognized configuration class"):
        DOORS[door](str(evil))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("door", [check_model, check_reward, check_nli, load_policy])
def test_code_of_a_config(evil, door):
    change_config(evil, model_type="evil", auto_map={**EVIL_CONFIG, **EVIL_MODELS})
    with pytest.raises(InputError, match="evil: neither a model folder"):
        door(str(evil))


def test_code_of_a_tokenizer(evil):
    change_config(evil, model_type="evil", auto_map={**EVIL_CONFIG, **EVIL_MODELS})
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config = {"tokenizer_class": "Evil", "auto_map": auto_map}
    write_json(evil / "tokenizer_config.json", config)
    with pytest.raises(InputError, match="evil: no tokenizer could be loaded"):
        load_tokenizer(str(evil))


# -------------------------------------------------------------------------------- the source itself

PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# from_pretrained of these is a method of this project.
OURS = ("SARM", "cls")


def source_files():
    """The scripts and the package, without what a reader keeps beside the scripts."""
    scripts = [Path(module.__file__) for module in (probe, *ALL_SCRIPTS.values())]
    return sorted([*scripts, *REPO.glob("nanorlhf/**/*.py")])


def imported_names(node):
    """The modules and names that an import statement names."""
    names = {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        names.add(node.module)
    return names


def constant_keywords(call):
    """{name: value} of a call's keywords whose values are written out."""
    values = {}
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Constant):
            values[keyword.arg] = keyword.value.value
    return values


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.name)
def test_no_source_file_reads_a_pickle_or_runs_remote_code(path):
    """transformers' from_pretrained and from_config are called with trust_remote_code=False."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not imported_names(node) & PICKLES, node.lineno
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        keywords = constant_keywords(node)
        receiver = getattr(node.func.value, "id", "")
        method = node.func.attr
        if method in ("from_pretrained", "from_config") and receiver not in OURS:
            assert keywords.get("trust_remote_code") is False, node.lineno
        if receiver == "torch" and method == "load":
            assert keywords.get("weights_only") is True, node.lineno


# ------------------------------------------------------------------------------------------ weights

IDS = torch.tensor([[5, 6, 7]])
PICKLE = "never from a pickle"
OUTSIDE = "outside the model's own folder"


class Mark:
    """What leaves a mark when its pickle is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def save_sharded(folder):
    """A policy in several safetensors files with their index, as transformers writes it.

    Returns its logits on IDS.
    """
    lm = tiny_lm("llama")
    lm.save_pretrained(folder, max_shard_size="20KB")
    word_tokenizer().save_pretrained(folder)
    assert (Path(folder) / INDEX).exists()
    assert not (Path(folder) / "model.safetensors").exists()
    return lm(input_ids=IDS).logits


def test_shards_load_beside_their_index(tmp_path):
    expected = save_sharded(tmp_path / "model")
    policy = load_policy(str(tmp_path / "model"), value_head=False)
    assert policy.lm(input_ids=IDS).logits.equal(expected)


def test_shards_load_through_links(tmp_path):
    """The hub's cache consists of links."""
    expected = save_sharded(tmp_path / "model")
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "model").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    policy = load_policy(str(tmp_path / "links"), value_head=False)
    assert policy.lm(input_ids=IDS).logits.equal(expected)


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Another model's weights, as safetensors and as pickles that leave a mark.

    Nothing may load any of them.
    """

    def load(*args, **kwargs):
        pytest.fail("a pickle was read")

    folder = tmp_path / "other"
    tiny_lm("llama", seed=1).save_pretrained(folder)
    for name in ("pytorch_model.bin", "model.safetensors.bin", "adapter_model.bin"):
        torch.save({"x": Mark(str(tmp_path / "mark"))}, folder / name)
    monkeypatch.setattr(torch, "load", load)
    yield folder
    assert not (tmp_path / "mark").exists()


def point_index_at(folder, other, name):
    """Let the index of a sharded model say that its embeddings are in the file `name`.

    The pickles lie in the folder, and the other model's weights in sub/.
    """
    for file in other.glob("*.bin"):
        shutil.copy(file, folder)
    (folder / "sub").mkdir(exist_ok=True)
    shutil.copy(other / "model.safetensors", folder / "sub")
    # An empty file of weights, as a model's folder might have beside others.
    save_file({}, folder / "x.safetensors")

    index = json.loads((folder / INDEX).read_text())
    for tensor in index["weight_map"]:
        if "embed" in tensor:
            index["weight_map"][tensor] = name
    write_json(folder / INDEX, index)


@pytest.mark.parametrize("door", [check_model, check_reward, load_policy])
@pytest.mark.parametrize(
    "name, words",
    [
        ("pytorch_model.bin", PICKLE),
        ("model.safetensors.bin", PICKLE),
        ("../other/model.safetensors", OUTSIDE),
        ("{other}/model.safetensors", OUTSIDE),
        ("sub/../../other/model.safetensors", OUTSIDE),
        ("sub/model.safetensors", OUTSIDE),
        ("lost.safetensors", "no such file"),
        (5, "must be a name, not 5"),
        (None, "must be a name, not None"),
    ],
)
def test_an_index_that_leads_elsewhere(tmp_path, other, door, name, words):
    """check_model, which runs before anything is loaded, refuses it, and so do other doors."""
    if isinstance(name, str):
        name = name.format(other=other)
    save_sharded(tmp_path / "model")
    point_index_at(tmp_path / "model", other, name)
    with pytest.raises(InputError) as raised:
        door(str(tmp_path / "model"))
    assert words in str(raised.value)
    assert INDEX in str(raised.value)


@pytest.mark.parametrize("door", DOORS)
def test_a_pickle_at_every_door(tmp_path, other, door):
    folder = tmp_path / "model"
    save_sharded(folder)
    point_index_at(folder, other, "pytorch_model.bin")
    prepare_for(door, folder)
    with pytest.raises(InputError, match=PICKLE):
        DOORS[door](str(folder))


def test_a_value_model_is_looked_at_with_its_policy(tmp_path, other):
    folder = tmp_path / "model"
    save_sharded(folder)
    point_index_at(folder, other, "../other/model.safetensors")
    with pytest.raises(InputError, match=f"value_model.*{OUTSIDE}"):
        check_model(value_model_of(str(folder)))


def test_a_pickled_adapter(tmp_path, other):
    save_sharded(tmp_path / "model")
    adapter = Path(adapter_on(str(tmp_path / "model")))
    os.remove(adapter / "adapter_model.safetensors")
    shutil.copy(other / "adapter_model.bin", adapter)
    with pytest.raises(InputError, match="an adapter without adapter_model.safetensors"):
        check_model(str(adapter))


def test_a_sarm_in_several_files_loads(tmp_path):
    _, tensors = public_checkpoint(tmp_path / "sarm", shards=2)
    sarm = SARM.from_pretrained(str(tmp_path / "sarm"))
    assert sarm.score.weight.equal(tensors["score.weight"])


@pytest.mark.parametrize("door", [check_reward, SARM.from_pretrained])
@pytest.mark.parametrize(
    "name, words",
    [
        ("pytorch_model.bin", PICKLE),
        ("../other/model.safetensors", OUTSIDE),
        ("{other}/model.safetensors", OUTSIDE),
    ],
)
def test_a_sarm_whose_index_leads_elsewhere(tmp_path, other, door, name, words):
    folder = tmp_path / "sarm"
    public_checkpoint(folder, shards=2)
    shutil.copy(other / "pytorch_model.bin", folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["score.weight"] = name.format(other=other)
    write_json(folder / INDEX, index)
    with pytest.raises(InputError, match=words):
        door(str(folder))


NO_INDEX = pytest.mark.parametrize(
    "text", ["{oops", "[]", "5", "{}", '{"weight_map": []}', '{"weight_map": {}}']
)


@NO_INDEX
def test_a_model_whose_index_is_none(tmp_path, text):
    save_sharded(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(text)
    with pytest.raises(InputError, match=INDEX):
        check_model(str(tmp_path / "model"))
    with pytest.raises(InputError, match=INDEX):
        load_policy(str(tmp_path / "model"))


@NO_INDEX
def test_a_sarm_whose_index_is_none(tmp_path, text):
    public_checkpoint(tmp_path / "sarm", shards=2)
    (tmp_path / "sarm" / INDEX).write_text(text)
    with pytest.raises(InputError, match=INDEX):
        check_reward(str(tmp_path / "sarm"))
    with pytest.raises(InputError, match=INDEX):
        SARM.from_pretrained(str(tmp_path / "sarm"))


def test_an_index_beside_whole_weights(tmp_path, other):
    """model.safetensors would be read, and the index not; it is refused all the same."""
    folder = tmp_path / "model"
    save_sharded(folder)
    point_index_at(folder, other, "pytorch_model.bin")
    tiny_lm("llama").save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole/model.safetensors", folder)
    with pytest.raises(InputError, match=PICKLE):
        check_model(str(folder))


def test_whole_weights_are_read_beside_an_index(tmp_path):
    """The index is left over from shards that are gone."""
    folder = tmp_path / "model"
    expected = save_sharded(folder)
    tiny_lm("llama").save_pretrained(tmp_path / "whole")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    shutil.copy(tmp_path / "whole/model.safetensors", folder)
    policy = load_policy(str(folder), value_head=False)
    assert policy.lm(input_ids=IDS).logits.equal(expected)


@pytest.mark.parametrize("door", [check_model, load_policy])
@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "x.safetensors",
        "x.safetensors.index.json",
        "../other/model.safetensors",
    ],
)
def test_a_config_that_names_the_file_of_weights(tmp_path, other, name, door):
    """transformers_weights of config.json takes the place of model.safetensors.

    The file may be a pickle of that one name.
    """
    folder = tmp_path / "model"
    tiny_lm("llama").save_pretrained(folder)
    shutil.copy(other / "adapter_model.bin", folder)
    shutil.copy(other / "model.safetensors", folder / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "adapter_model.bin"}}
    write_json(folder / "x.safetensors.index.json", index)
    change_config(folder, transformers_weights=name)
    with pytest.raises(InputError, match="transformers_weights"):
        door(str(folder))


def test_weights_of_another_name_are_none(tmp_path):
    """x.safetensors is no model's weights; nor is the value head."""
    lm = AutoModelForCausalLM.from_config(tiny_lm("llama").config)
    lm.save_pretrained(tmp_path / "model")
    os.rename(tmp_path / "model/model.safetensors", tmp_path / "model/x.safetensors")
    save_file({}, tmp_path / "model/value_head.safetensors")
    with pytest.raises(InputError, match="no weights"):
        check_model(str(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_the_scripts_refuse_a_pickle(here, capfd, kind):
    """An index names pytorch_model.bin, and an empty x.safetensors lies beside it."""
    tensors = load_file("model/model.safetensors")
    os.remove("model/model.safetensors")
    torch.save(tensors, "model/pytorch_model.bin")
    weight_map = dict.fromkeys(tensors, "pytorch_model.bin")
    write_json(f"model/{INDEX}", {"metadata": {}, "weight_map": weight_map})
    save_file({}, "model/x.safetensors")
    words = [f"model/{INDEX}: ", "is in pytorch_model.bin", PICKLE]
    refused(capfd, kind, arguments(kind), *words)
