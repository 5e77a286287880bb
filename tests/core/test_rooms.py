"""The plan of the house: which file may import which. It is read from the files, imports inside functions too.

    errors and equations < runtime/{rng, files, tensors, hints} < hf/ < the rest of runtime/ < spine < interp/, evals/ < control/ < studies/, show/ < scripts

A file imports from its own room and from the rooms below it. control/ knows interp/, but not evals/. No script imports a script:
stages.py calls them by name. There are no circles.
"""

import ast

import pytest
from support import REPO

SCRIPTS = {"train_sft", "train_rm", "train_ppo", "sample_bon", "train_sae", "probe"}
EQUATIONS = {
    "ppo",
    "dpo",
    "ensemble",
    "bon",
    "sae",
    "sparse",
    "penalties",
    "divergence",
    "diversity",
    "stats",
}
LOWEST_OF_RUNTIME = {"runtime.rng", "runtime.files", "runtime.tensors", "runtime.hints"}
FLOORS = {
    "hf": 2,
    "runtime": 3,
    "spine": 4,
    "interp": 5,
    "evals": 5,
    "control": 6,
    "studies": 7,
    "show": 7,
    "scripts": 8,
}
MOST_LEVELS = 12
MOST_FILES = 26


def module_paths():
    """{module: its file}: "ppo", "hf.lora", and the scripts' names."""
    paths = {name: REPO / f"{name}.py" for name in SCRIPTS}
    for path in (REPO / "nanorlhf").rglob("*.py"):
        name = ".".join(path.relative_to(REPO / "nanorlhf").with_suffix("").parts)
        if not name.endswith("__init__"):
            paths[name] = path
    return paths


def imports_of(module, path):
    """The names that a file imports, relative ones resolved: {"hf.lora", "hf.lora.merge", "torch", ...}."""
    here = [] if module in SCRIPTS else ["nanorlhf", *module.split(".")[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) + 1 - node.level] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            names.add(origin)
            names |= {
                f"{origin}.{alias.name}" for alias in node.names
            }  # a module, or a name in one
    return {name.removeprefix("nanorlhf.") for name in names}


PATHS = module_paths()
IMPORTS = {
    module: (imports_of(module, path) & PATHS.keys()) - {module} for module, path in PATHS.items()
}


def room_of(module):
    if module in SCRIPTS:
        return "scripts"
    return module.split(".")[0] if "." in module else "spine"


def floor_of(module):
    """How high up in the house a module is: it may not import from above."""
    if module in EQUATIONS or module == "errors":
        return 0
    if module in LOWEST_OF_RUNTIME:
        return 1
    return FLOORS[room_of(module)]


@pytest.mark.parametrize("module", sorted(PATHS))
def test_a_file_imports_from_its_room_and_below(module):
    for imported in IMPORTS[module]:
        assert floor_of(imported) <= floor_of(module), f"{module} imports {imported} from above"
        if floor_of(imported) == floor_of(module):
            assert room_of(imported) == room_of(module) != "scripts", f"{module} imports {imported}"
        assert (room_of(module), room_of(imported)) != ("control", "evals"), (
            f"{module} imports {imported}"
        )


def test_there_is_one_way_down():
    """No circle; and the longest chain of imports is short."""
    levels = {}

    def level(module, above=()):
        assert module not in above, f"a circle: {' > '.join([*above, module])}"
        if module not in levels:
            below = [level(imported, (*above, module)) for imported in sorted(IMPORTS[module])]
            levels[module] = 1 + max(below, default=0)
        return levels[module]

    assert max(level(module) for module in PATHS) <= MOST_LEVELS
    assert (
        levels["errors"] == 1 and levels["train_ppo"] > levels["models"] > levels["hf.lora"]
    )  # imports were found at all


def test_no_room_is_crowded():
    for folder in [
        REPO / "nanorlhf",
        *(path for path in (REPO / "nanorlhf").iterdir() if path.is_dir()),
    ]:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def test_no_test_file_imports_another():
    """What two test files need stands in support.py or in a conftest.py; file names are distinct across folders."""
    paths = [*(REPO / "tests").rglob("test_*.py")]
    names = [path.stem for path in paths]
    assert len(names) > 40 and len(set(names)) == len(names)
    for path in paths:
        roots = {name.split(".")[0] for name in imports_of("tests", path)}
        assert not roots & set(names), path
