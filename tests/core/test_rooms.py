"""The plan of the house: which file may import which. It is read from the files.

Imports inside functions count too.

    errors and equations < runtime/{rng, files, tensors, hints} < hf/ < the rest of runtime/
    < spine < interp/, evals/ < control/ < studies/, show/ < scripts

A file imports from its own room and from the rooms below it. control/ knows interp/, but not
evals/. No script imports a script: stages.py calls them by name. There are no circles.
"""

import ast
import subprocess
import sys

import pytest
from support import REPO

WIDEST = 100  # columns
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
# The spine has 28 files: four of them, chats, formats, chat_templates and tokens, are steps of one
# way, from data to ids.
MOST_FILES = 28


def find_modules():
    """{module: its file}: "ppo", "hf.lora", and the scripts' names."""
    paths = {name: REPO / f"{name}.py" for name in SCRIPTS}
    package = REPO / "nanorlhf"
    for path in package.rglob("*.py"):
        if path.name != "__init__.py":
            parts = path.relative_to(package).with_suffix("").parts
            paths[".".join(parts)] = path
    return paths


def origin_of(node, package):
    """What `from X import ...` names as X, for a file in this package (a list of names)."""
    origin = []
    if node.level:
        # One dot is the package itself, two dots the one above it.
        origin = package[: len(package) + 1 - node.level]
    if node.module:
        origin = [*origin, node.module]
    return ".".join(origin)


def walk_statements(node):
    """All statements below a node. Expressions, most of a file, hold no import."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for statement in getattr(node, field, []):
            yield statement
            yield from walk_statements(statement)


def read_imports(module, path):
    """The names that a file imports: {"hf.lora", "hf.lora.merge", "torch", ...}.

    Of `from X import y` it is both X and X.y: y is a module, or a name in one.
    """
    package = []
    if module not in SCRIPTS:
        *rooms, _ = module.split(".")
        package = ["nanorlhf", *rooms]
    names = set()
    for node in walk_statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            origin = origin_of(node, package)
            names.add(origin)
            for alias in node.names:
                names.add(f"{origin}.{alias.name}")
    return {name.removeprefix("nanorlhf.") for name in names}


PATHS = find_modules()
IMPORTS = {}  # {module: the modules of the project that it imports}
for module, path in PATHS.items():
    imported = read_imports(module, path)
    IMPORTS[module] = (imported & PATHS.keys()) - {module}


def room_of(module):
    if module in SCRIPTS:
        return "scripts"
    if "." not in module:
        return "spine"
    room, _ = module.split(".", 1)
    return room


def floor_of(module):
    """How high up in the house a module is: it may not import from above."""
    if module in EQUATIONS or module == "errors":
        return 0
    if module in LOWEST_OF_RUNTIME:
        return 1
    return FLOORS[room_of(module)]


@pytest.mark.parametrize("module", sorted(PATHS))
def test_a_file_imports_from_its_room_and_below(module):
    room = room_of(module)
    for imported in IMPORTS[module]:
        words = f"{module} imports {imported}"
        assert floor_of(imported) <= floor_of(module), f"{words} from above"
        if floor_of(imported) == floor_of(module):
            assert room_of(imported) == room, words
            assert room != "scripts", words
        if room == "control":
            assert room_of(imported) != "evals", words


LEVELS = {}  # {module: the longest chain of imports that begins there}


def level_of(module, above=()):
    """The level of a module that those above import; they are there to find circles."""
    assert module not in above, f"a circle: {' > '.join([*above, module])}"
    if module not in LEVELS:
        highest = 0
        for imported in sorted(IMPORTS[module]):
            highest = max(highest, level_of(imported, (*above, module)))
        LEVELS[module] = highest + 1
    return LEVELS[module]


def test_there_is_one_way_down():
    """No circle; and the longest chain of imports is short."""
    for module in PATHS:
        assert level_of(module) <= MOST_LEVELS, module


def test_imports_are_found_at_all():
    assert level_of("errors") == 1
    assert level_of("train_ppo") > level_of("models") > level_of("hf.lora")


def modules_after(imported):
    """The modules that a fresh Python holds once this one is imported."""
    code = f"import sys, {imported}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_names_no_model_class_before_it_loads_a_model(script):
    """The package transformers.models reads thousands of files when it is imported."""
    modules = modules_after(script)
    assert "transformers" in modules
    assert "transformers.models" not in modules


@pytest.mark.slow
def test_pictures_start_without_torch_and_transformers():
    modules = modules_after("nanorlhf.runtime.plots")
    assert "numpy" in modules
    assert "torch" not in modules
    assert "transformers" not in modules


def test_no_room_is_crowded():
    package = REPO / "nanorlhf"
    rooms = [path for path in package.iterdir() if path.is_dir()]
    for folder in [package, *rooms]:
        files = list(folder.glob("*.py"))
        assert len(files) <= MOST_FILES, folder


def test_no_test_file_imports_another():
    """What two test files need stands in a module of helpers or in a conftest.py."""
    paths = list((REPO / "tests").rglob("test_*.py"))
    names = {path.stem for path in paths}
    assert len(names) > 40
    # Names are distinct across folders.
    assert len(names) == len(paths)
    for path in paths:
        for imported in read_imports("tests", path):
            top, *_ = imported.split(".")
            assert top not in names, path


def test_lines_of_code_fit():
    """The formatter leaves long strings and comments as they are.

    What a reader keeps beside the scripts, such as a my.py, may be as wide as they like.
    """
    too_wide = []
    for path in [*PATHS.values(), *REPO.glob("tests/**/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > WIDEST:
                too_wide.append(f"{path.relative_to(REPO)}:{number}")
    assert not too_wide
