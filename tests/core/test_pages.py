"""What every page (*.md) promises: links lead somewhere, lines fit, files and flags exist.

How pages are read stands in tests/links.py, which also mends links to lines.
The commands of the pages are run by tests/runs/test_page_commands.py.
"""

import ast
import functools
import importlib
import re

import pytest
from links import (
    CODE_SPAN,
    LINK,
    REPO,
    blank_blocks,
    find_definitions,
    find_files,
    find_line,
    find_pages,
    is_elsewhere,
    line_of,
    mend,
    read_anchors,
    read_blocks,
    read_links,
    slug,
)

import probe
import train_ppo

WIDEST = 110
LONGEST_README = 250
INSTALL = "pip install --no-compile -r requirements.txt && "

every_page = pytest.mark.parametrize(
    "page", find_pages(), ids=lambda page: str(page.relative_to(REPO))
)


def read(page):
    return page.read_text(encoding="utf-8")


def fail_with(page, faults):
    """One line for each fault: PAGE:LINE: what is wrong."""
    name = page.relative_to(REPO)
    assert not faults, "\n" + "\n".join(f"{name}:{line}: {what}" for line, what in faults)


# ----------------------------------------------------------------------------------------- links


def faults_of_links(page, text):
    """Links of a page that lead nowhere, as (line, what is wrong)."""
    faults = []
    for link in read_links(text):
        if is_elsewhere(link.target):
            continue
        file, _, anchor = link.target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if file and not path.exists():
            faults.append((link.line, f"{link.target}: there is no such file"))
        elif file and path.is_file() and str(path.relative_to(REPO)) not in find_files():
            faults.append((link.line, f"{link.target} is no part of the repository"))
        elif anchor and path.suffix == ".md" and not has_anchor(path, anchor, page, text):
            faults.append((link.line, f"{link.target}: there is no such heading"))
        elif anchor and path.suffix not in (".md", ".py"):
            faults.append(
                (link.line, f"{link.target}: only pages and Python files have parts to link to")
            )
        elif link.picture and path.suffix not in (".png", ".svg"):
            faults.append((link.line, f"{link.target} is no picture"))
        elif link.picture and not link.text.strip():
            faults.append(
                (link.line, f"{link.target}: a picture needs a text for those who cannot see it")
            )
    return faults


def has_anchor(path, anchor, page, text):
    """Whether a page has a part of this name. `text` is what `page` holds, or will."""
    if path != page:
        text = read(path)
    return anchor in read_anchors(text)


@every_page
def test_links_lead_somewhere(page):
    fail_with(page, faults_of_links(page, read(page)))


@every_page
def test_links_to_a_line_lead_to_what_they_name(page):
    mended, faults = mend(read(page), page)
    assert not faults, "\n" + "\n".join(faults)
    assert mended == read(page), "line numbers of links have moved: run python tests/links.py"


def test_links_that_lead_nowhere_are_found():
    page = REPO / "nanorlhf" / "PAGE.md"
    text = (
        "# A page\n\n[a](ppo.py) [b](../README.md) [c](#a-page) [d](https://x.org/y)\n"
        "[e](no.py) [f](#no-page) [g](../README.md#no-heading)\n"
        "![h](ppo.py) `[i](no.py)` ![](../assets/control.png)\n"
        "```text\n[j](no.py)\n```\n"
        "[two\nlines](no.md) [![a picture](../assets/no.png)](ppo.py)\n"
    )
    found = [(line, what.split(":")[0].split()[0]) for line, what in faults_of_links(page, text)]
    lost = [(4, "no.py"), (4, "#no-page"), (4, "../README.md#no-heading")]
    pictures = [(5, "ppo.py"), (5, "../assets/control.png")]
    assert found == [*lost, *pictures, (9, "no.md"), (10, "../assets/no.png")]


@pytest.mark.parametrize(
    "heading, anchor",
    [
        ("What RLHF is", "what-rlhf-is"),
        ("Overoptimisation, and what ensembles do", "overoptimisation-and-what-ensembles-do"),
        ("`train_sae.py`: *sparse* autoencoders ##", "train_saepy-sparse-autoencoders"),
        ("Best-of-n & [PPO](ppo.py)", "best-of-n--ppo"),
    ],
)
def test_headings_become_addresses_as_on_github(heading, anchor):
    assert slug(heading) == anchor
    assert anchor in read_anchors(f"# Title\n\n## {heading}\n")


def test_equal_headings_are_numbered():
    assert read_anchors("# A\n## A\n```\n# B\n```\n## A\n") == {"a", "a-1", "a-2"}


# -------------------------------------------------------------------------------- links to a line


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "room" / "loss.py"
    path.parent.mkdir()
    path.write_text(
        "import math\n\nRATE: float = 1.0\nA, B = 1, 2\n\n\n"
        "@math.cache\ndef gae(x):\n    y = 1\n\n\n"
        "class Policy:\n    size: int = 1\n\n    def forward(self):\n        def inner(): pass\n"
    )
    return path


def test_what_can_be_linked_to(module):
    lines = {
        "RATE": 3,
        "A": 4,
        "B": 4,
        "gae": 8,
        "Policy": 12,
        "Policy.size": 13,
        "Policy.forward": 15,
    }
    assert find_definitions(module) == lines
    for name, line in lines.items():
        for text in (
            name,
            f"`{name}`",
            f"loss.{name}",
            f"`room.loss.{name}`",
            f"the loss\n`{name}()`",
        ):
            assert find_line(text, module) == line, text
    for text in ("forward", "y", "inner", "loss.Policy.gae", "other.gae", "Other.forward", ""):
        assert find_line(text, module) is None, text


def test_line_numbers_are_mended_and_nothing_else_changes(module, tmp_path):
    page = tmp_path / "page.md"
    text = (
        "See [`loss.gae`](room/loss.py#L1), [the file](room/loss.py),\n"
        "[Policy.forward](room/loss.py#L15); `[gae](room/loss.py#L2)`,\n"
        "[gae](room/loss.py#L99999) and [gae](https://x.org/loss.py#L1).\n"
        "```text\n[gae](room/loss.py#L3)\n```\n"
    )
    wanted = text.replace("#L1),", "#L8),").replace("#L99999", "#L8")
    assert mend(text, page) == (wanted, [])
    assert mend(wanted, page) == (wanted, [])

    bad = (
        "[nobody](room/loss.py#L1)\n\n"
        "[gae](room/no.py#L2) [gae](room/loss.py#L2-L3) [gae](page.md#L4)\n"
    )
    mended, faults = mend(bad, page)
    assert mended == bad
    assert [fault.split(": ")[0] for fault in faults] == ["page.md:1", *["page.md:3"] * 3]


# ----------------------------------------------------------------------------------------- lines


def faults_of_width(text):
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        # An address cannot be broken.
        if len(line) > WIDEST and not re.fullmatch(r"\s*(\[[^\]]*\]: ?)?<?https?://\S+", line):
            faults.append((number, f"{len(line)} columns, of {WIDEST}"))
    return faults


@every_page
def test_lines_fit(page):
    fail_with(page, faults_of_width(read(page)))


def test_wide_lines_are_found():
    address = "https://x.org/" + "y" * WIDEST
    text = "\n".join(["x" * WIDEST, "x" * (WIDEST + 1), "| x " * WIDEST, address, f"see {address}"])
    assert [line for line, _ in faults_of_width(text)] == [2, 3, 5]


def test_the_front_page_is_short():
    assert len(read(REPO / "README.md").splitlines()) <= LONGEST_README


def test_the_front_page_holds_the_two_commands():
    """To install and run; to install and test: a line of its own each. .ci/run reads the second."""
    lines = [
        line
        for block in read_blocks(read(REPO / "README.md"))
        if block.language == "bash"
        for line in block.lines
    ]
    assert f"{INSTALL}python train_ppo.py" in lines
    tests = [line for line in lines if re.fullmatch(rf"{re.escape(INSTALL)}.*pytest.*", line)]
    assert tests == [f"{INSTALL}python -m pytest -q tests"]


# -------------------------------------------------------------------------------- names of files

FILE = re.compile(r"(?<![\w./-])[\w./-]*\w\.(?:py|md|txt|ini)(?![\w/-])")


def find_file(name, page):
    """The file that a name on a page stands for (by its path, or its end), or None."""
    from_page = (page.parent / name).resolve()
    for path in (from_page, REPO / name):
        if path.is_relative_to(REPO) and str(path.relative_to(REPO)) in find_files():
            return str(path.relative_to(REPO))
    found = files_that_end_with(name)
    return found[0] if len(found) == 1 else None


def files_that_end_with(name):
    return [file for file in find_files() if f"/{file}".endswith(f"/{name}")]


def names_of_files(text):
    """Where a page names files, outside of blocks, headings and links: (offset, name).

    In code only a name that stands alone: `ppo.py`, not `python train_ppo.py`.
    """
    text = blank_blocks(text)
    text = re.sub(r"^#+ .*$", lambda heading: " " * len(heading[0]), text, flags=re.MULTILINE)
    text = LINK.sub(lambda link: " " * len(link[0]), text)
    found = []
    for span in CODE_SPAN.finditer(text):
        if FILE.fullmatch(span[2].strip()):
            found.append((span.start(), span[2].strip()))
    text = CODE_SPAN.sub(lambda span: " " * len(span[0]), text)
    text = re.sub(r"https?://\S+", lambda address: " " * len(address[0]), text)
    for match in FILE.finditer(text):
        found.append((match.start(), match[0]))
    return sorted(found)


def faults_of_names(page, text):
    """Files of the repository that a page names without a link, as (line, what is wrong).

    A section that links to a file once may name it again without; but what the first cell of a
    table's row names is always a link.
    """
    lines = blank_blocks(text).splitlines()
    section_of = {}  # {line: how many headings stand above it}
    section = 0
    for number, line in enumerate(lines, start=1):
        section += bool(re.match(r"#+ ", line))
        section_of[number] = section

    linked = set()  # (section, file)
    for link in read_links(text):
        path = (page.parent / link.target.partition("#")[0]).resolve()
        if not is_elsewhere(link.target) and path.is_relative_to(REPO):
            linked.add((section_of[link.line], str(path.relative_to(REPO))))

    faults = []
    for offset, name in names_of_files(text):
        number = line_of(text, offset)
        file = find_file(name, page)
        if file is None or REPO / file == page:
            continue
        line = lines[number - 1]
        column = offset - (text.rfind("\n", 0, offset) + 1)
        first_cell = line.lstrip().startswith("|") and line[:column].count("|") <= 1
        if first_cell or (section_of[number], file) not in linked:
            faults.append((number, f"{name} is no link to {file}"))
    return faults


@every_page
def test_names_of_files_are_links(page):
    fail_with(page, faults_of_names(page, read(page)))


def test_names_without_a_link_are_found():
    page = REPO / "nanorlhf" / "PAGE.md"
    text = (
        "# ppo.py\n\n`ppo.py`, then [`ppo.py`](ppo.py), then ppo.py;\n"
        "hf/lora.py, lora.py and `python train_ppo.py`\n"
        "```bash\npython probe.py\n```\n"
        "## Next\n`train_ppo.py` no_file.py config.json https://x.org/ppo.py `nanorlhf/ppo.py`\n\n"
        "| [dpo.py](dpo.py) | `bon.py` |\n| --- | --- |\n| `dpo.py` | dpo.py |\n"
    )
    found = [(line, what.split()[0]) for line, what in faults_of_names(page, text)]
    assert found == [
        (4, "hf/lora.py"),
        (4, "lora.py"),
        (9, "train_ppo.py"),
        (9, "nanorlhf/ppo.py"),
        (11, "bon.py"),
        (13, "dpo.py"),
    ]


# Files that are neither here nor written by a block of the page: a reader's own.
A_READERS_OWN = re.compile(r"my\w*\.py|[A-Z_]+\.\w+")


def faults_of_lost_files(page, text):
    """Python files and pages that a page names and that do not exist: moved, or misspelt."""
    written = set()
    for block in read_blocks(text):
        first_line = block.lines[0] if block.lines else ""
        named = re.fullmatch(r"# (\S+)", first_line)
        if named:
            written.add(named[1])
    faults = []
    for offset, name in names_of_files(text):
        if name in written or A_READERS_OWN.fullmatch(name):
            continue
        exists = find_file(name, page) or files_that_end_with(name)
        if not exists and name.endswith((".py", ".md")):
            faults.append((line_of(text, offset), f"{name}: there is no such file"))
    return faults


@every_page
def test_files_that_are_named_exist(page):
    fail_with(page, faults_of_lost_files(page, read(page)))


def test_lost_files_are_found():
    page = REPO / "nanorlhf" / "PAGE.md"
    text = (
        "`ppo.py` `my.py` `conftest.py` `reward.py` hf/gone.py `out.txt` FILE.py `own.py`\n"
        "```python\n# own.py\n```\n"
    )
    assert [what.split(":")[0] for _, what in faults_of_lost_files(page, text)] == [
        "reward.py",
        "hf/gone.py",
    ]


# ------------------------------------------------------------------------------- quoted code

# An exercise ends with the lines that it was about.
THE_LINES = re.compile(r"^The lines:.*?(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)


@functools.cache
def all_code():
    """The code of the scripts and of the package, with single spaces."""
    texts = []
    for file in find_files():
        if file.endswith(".py") and not file.startswith("tests/"):
            texts.append(read(REPO / file))
    return " ".join(" ".join(texts).split())


def faults_of_quotes(text):
    """Assignments that a page quotes as the lines of an exercise, and that no code has."""
    faults = []
    for paragraph in THE_LINES.finditer(text):
        for span in CODE_SPAN.finditer(paragraph[0]):
            quote = " ".join(span[2].split())
            if " = " in quote and quote not in all_code():
                line = line_of(text, paragraph.start() + span.start())
                faults.append((line, f"{quote}: no code has this line"))
    return faults


@every_page
def test_quoted_lines_stand_in_the_code(page):
    fail_with(page, faults_of_quotes(read(page)))


def test_quotes_that_no_code_has_are_found():
    right = "`penalties = torch.where(response_mask,\n-kl_coef * kl, 0.0)`"
    text = f"`penalties = 1`\n\nThe lines: {right}; `penalties = 2`\n"
    assert faults_of_quotes(text) == [(4, "penalties = 2: no code has this line")]


# ------------------------------------------------------------------------------ names in code


@functools.cache
def every_test():
    """The names of all tests."""
    names = set()
    for file in find_files():
        if file.startswith("tests/") and file.endswith(".py"):
            names |= set(re.findall(r"^def (test_\w+)", read(REPO / file), re.MULTILINE))
    return names


def faults_of_tests(text):
    """Tests that a page names, `test_like_this`, and that are none."""
    faults = []
    for span in CODE_SPAN.finditer(text):
        name = span[2]
        if re.fullmatch(r"test_\w+", name) and name not in every_test():
            faults.append((line_of(text, span.start()), f"{name}: there is no such test"))
    return faults


@every_page
def test_tests_that_are_named_exist(page):
    fail_with(page, faults_of_tests(read(page)))


def test_names_of_no_test_are_found():
    text = "`test_tests_that_are_named_exist`, `test_ppo.py`\nand `test_nothing`\n"
    assert faults_of_tests(text) == [(2, "test_nothing: there is no such test")]


FLAG = re.compile(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)")
OF_OTHER_TOOLS = {
    "nproc_per_node",
    "nproc-per-node",
    "nnodes",
    "max_restarts",
    "standalone",
    "rdzv_backend",
    "rdzv_endpoint",
    "help",
    "pdb",
}


@functools.cache
def every_flag():
    """The flags of scripts, studies, benchmarks and tests, as their sources say; torchrun's too."""
    flags = set(OF_OTHER_TOOLS)
    for file in find_files():
        is_test = file.startswith("tests/") and not file.startswith(
            ("tests/bench/", "tests/conftest")
        )
        if is_test or not file.endswith(".py"):
            continue
        source = read(REPO / file)
        declared = r"(?:add_argument\(|addoption\(|aliases=\[)\s*\"--([\w-]+)\""
        flags |= set(re.findall(declared, source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.decorator_list:
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                flags |= {field.target.id for field in fields}
    return flags


def faults_of_flags(text):
    """Flags, and commands of probe.py, that a page names in its prose and that no script has.

    The commands in blocks are run by runs/test_page_commands.py.
    """
    faults = []
    for span in CODE_SPAN.finditer(blank_blocks(text)):
        line = line_of(text, span.start())
        for name in FLAG.findall(span[2]):
            if name not in every_flag():
                faults.append((line, f"--{name}: no script has such a flag"))
        for name in re.findall(r"\bprobe\.py ([a-z]\w*)", span[2]):
            if name not in probe.COMMANDS:
                faults.append((line, f"probe.py {name}: there is no such command"))
    return faults


@every_page
def test_flags_exist(page):
    fail_with(page, faults_of_flags(read(page)))


def test_flags_that_nobody_has_are_found():
    text = (
        "`--kl_coef 0` and `--kl_weight`, `train_ppo.py --steps 3 --stepz 4`;\n"
        "`--kills`, `--quick`, `--rm_flags`, `--from`, --no_code;\n"
        "`probe.py features --top 3`, `python probe.py future`, `probe.py COMMAND`"
    )
    faults = [(line, what.split(":")[0]) for line, what in faults_of_flags(text)]
    assert faults == [(1, "--kl_weight"), (1, "--stepz"), (3, "probe.py future")]


@every_page
def test_python_on_a_page_is_right(page):
    """Its syntax; and that what it imports from here is there."""
    for block in read_blocks(read(page)):
        if block.language != "python":
            continue
        tree = ast.parse(
            "\n".join(block.lines), f"{page.relative_to(REPO)}, the block in line {block.line}"
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "nanorlhf":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    try:
                        known = hasattr(module, alias.name) or importlib.import_module(
                            f"{node.module}.{alias.name}"
                        )
                    except ModuleNotFoundError:
                        known = False
                    assert known, (
                        f"{page.relative_to(REPO)}:{block.line}: {node.module} has no {alias.name}"
                    )


def test_blocks_are_read_as_they_stand():
    text = (
        "```bash needs=hub\necho ~~~\n```\n"
        "1. item\n\n   ```python\n   # my.py\n       x = 1\n   ```\n"
        "````md\n```bash\n```\n````\n"
    )
    blocks = [(block.line, block.language, block.tags, block.lines) for block in read_blocks(text)]
    assert blocks == [
        (1, "bash", {"needs": "hub"}, ["echo ~~~"]),
        (6, "python", {}, ["# my.py", "    x = 1"]),
        (10, "md", {}, ["```bash", "```"]),
    ]
    with pytest.raises(ValueError, match="line 2 "):
        read_blocks("text\n```bash\npython train_ppo.py\n")
    with pytest.raises(ValueError, match="line 2 "):
        read_blocks("text\n```bash\npython train_ppo.py```\ntext\n```text\n```\n")


NEEDS = ("hub", "gpu", "data", "run")
LANGUAGES = ("bash", "python", "text", "jsonl", "json", "tsv")


def faults_of_blocks(text):
    """Blocks that nobody would run: without a language, with one misspelt, without fences."""
    faults = []
    for block in read_blocks(text):
        if block.language not in LANGUAGES:
            faults.append((block.line, f"{block.language!r} is none of {', '.join(LANGUAGES)}"))
        if block.tags.keys() - {"needs"} or block.tags.get("needs", "hub") not in NEEDS:
            faults.append((block.line, f"{block.tags}: the tags are needs={' or '.join(NEEDS)}"))
    for number, line in enumerate(blank_blocks(text).splitlines(), start=1):
        if re.match(r"    +(python|torchrun) ", line):
            faults.append((number, "a command stands in a ```bash block"))
    return sorted(faults)


@every_page
def test_blocks_say_what_they_are(page):
    fail_with(page, faults_of_blocks(read(page)))


def test_blocks_that_nobody_would_run_are_found():
    blocks = ["```", "```sh", "```bash needs=hub", "```bash needs=time", "```text"]
    text = "".join(f"{fence}\npython probe.py\n```\n" for fence in blocks) + "    python probe.py\n"
    assert [line for line, _ in faults_of_blocks(text)] == [1, 4, 10, 16]


# -------------------------------------------------------------------------------- folders of runs


def training_commands(text):
    """The commands of a page that train into a folder: [(folder, the command's words, sorted)]."""
    commands = []
    for block in read_blocks(text):
        if block.language != "bash":
            continue
        for line in "\n".join(block.lines).replace("\\\n", " ").splitlines():
            command = re.sub(r"\s#.*", "", line)
            folder = re.search(r"train_\w+\.py .*--output_dir ('[^']+'|\S+)", command)
            if folder and "--resume" not in command:
                commands.append((folder[1], sorted(command.split())))
    return commands


def faults_of_folders(texts):
    """Folders into which two commands train differently: the second of them would be an error."""
    first = {}
    faults = []
    for text in texts:
        for folder, words in training_commands(text):
            if first.setdefault(folder, words) != words:
                faults.append(f"{folder}: {' '.join(words)}")
    return faults


def test_no_two_commands_train_into_one_folder():
    printed = f"```bash\n{train_ppo.TRY_NEXT}\n```\n"
    faults = faults_of_folders([printed, *[read(page) for page in find_pages()]])
    assert not faults, "\n".join(faults)


def test_two_commands_with_one_folder_are_found():
    page = "```bash\npython train_rm.py --lr 1 \\\n    --output_dir runs/a    # a note\n```\n"
    again = "```bash\npython train_rm.py --output_dir runs/a --lr 1\n```\n"
    other = "```bash\npython train_rm.py --lr 2 --output_dir runs/a\n```\n"
    assert not faults_of_folders([page, again])
    assert faults_of_folders([page, other])
