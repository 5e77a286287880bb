"""Read the pages (*.md): links, headings, blocks of code; mend the links to a line of a file.

    python tests/links.py      # mends all pages, and prints what it cannot mend

The text of such a link ends in the name of what stands in that line, as in
[ppo.gae](nanorlhf/ppo.py#L123): a function, a class, a variable of the module, or a method, written
Class.method. A module's name may come first. So the script finds the line again after the file has
changed. tests/core/test_pages.py checks what this file reads.
"""

import ast
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


@functools.cache
def find_files() -> tuple[str, ...]:
    """The repository's files, by their paths in it, without what runs and tools leave behind."""
    files = []
    for folder, inner, names in os.walk(REPO):
        # Not below .git, .venv, __pycache__; what .ci/ holds is part of the repository.
        inner[:] = [name for name in inner if name == ".ci" or not name.startswith((".", "__"))]
        if folder == str(REPO) and "runs" in inner:
            inner.remove("runs")
        for name in names:
            files.append(os.path.relpath(os.path.join(folder, name), REPO))
    return tuple(sorted(files))


def find_pages() -> list[Path]:
    """README.md, and every page in nanorlhf/ and tests/."""
    pages = [REPO / "README.md"]
    for file in find_files():
        if file.startswith(("nanorlhf/", "tests/")) and file.endswith(".md"):
            pages.append(REPO / file)
    return pages


# --------------------------------------------------------------------------------- blocks of code


@dataclass
class Block:
    """What stands between two fences. ```bash needs=hub: language bash, tags {"needs": "hub"}."""

    line: int  # of the first fence; the page's first line is 1
    language: str
    tags: dict[str, str]
    lines: list[str]  # without the fences


def read_blocks(text: str) -> list[Block]:
    """The blocks of code of a page. ValueError: one is not closed before the next one opens."""
    blocks = []
    block = None
    fence = ""
    indent = 0
    for number, line in enumerate(text.splitlines(), start=1):
        opening = re.fullmatch(r"( *)(```+|~~~+)(.*)", line)
        if block is None and opening:
            indent = len(opening[1])
            fence = opening[2]
            language, *tags = opening[3].split() or [""]
            block = Block(number, language, dict(tag.split("=", 1) for tag in tags), [])
        elif block is not None and line.strip() == fence:
            blocks.append(block)
            block = None
        elif block is not None and opening and opening[2] == fence:
            raise ValueError(
                f"the block of code in line {block.line} is open still in line {number}"
            )
        elif block is not None:
            # In a list a block is set in; its content is not.
            content = line[indent:] if not line[:indent].strip() else line
            block.lines.append(content)
    if block is not None:
        raise ValueError(f"the block of code in line {block.line} has no end")
    return blocks


def blank_blocks(text: str) -> str:
    """The page's text with blanks in place of its blocks of code: all else stays where it is."""
    lines = text.split("\n")
    for block in read_blocks(text):
        for i in range(block.line - 1, block.line + len(block.lines) + 1):
            lines[i] = " " * len(lines[i])
    return "\n".join(lines)


# A span of code in a paragraph: as many backticks before it as after it, and no empty line inside.
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n).)+?)(?<!`)\1(?!`)", re.DOTALL)


def line_of(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


# -------------------------------------------------------------------------------------- headings


def read_anchors(text: str) -> set[str]:
    """What a link to a part of this page may name after its #, by GitHub's rules."""
    anchors = set()
    for line in blank_blocks(text).splitlines():
        heading = re.match(r"#{1,6} +(.*)", line)
        if not heading:
            continue
        anchor = slug(heading[1])
        # The second heading of the same name is NAME-1, the third NAME-2.
        number = 0
        numbered = anchor
        while numbered in anchors:
            number += 1
            numbered = f"{anchor}-{number}"
        anchors.add(numbered)
    return anchors | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def slug(heading: str) -> str:
    """A heading in an address, by GitHub's rules: "What *is* `ppo.py`?" -> "what-is-ppopy"."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().rstrip("#").strip())
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


# ----------------------------------------------------------------------------------------- links


@dataclass
class Link:
    line: int
    text: str  # between the brackets
    target: str
    start: int  # of the target, in the page's text
    picture: bool = False


# Brackets may stand in brackets once: [![a picture](in.png)](a page)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*([^()\s]+)(?:\s+\"[^\"]*\")?\s*\)")
HTML_LINK = re.compile(r"<(img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")


def read_links(text: str) -> list[Link]:
    """All links and pictures of a page, but for those in code."""
    text = blank_blocks(text)
    for span in list(CODE_SPAN.finditer(text)):
        # [`name`](target) is a link with code in it; `[name](target)` is code, and no link.
        if "](" in span[0]:
            text = text[: span.start()] + " " * len(span[0]) + text[span.end() :]
    links = []
    for match in LINK.finditer(text):
        for inner in LINK.finditer(text, match.start(2), match.end(2)):
            links.append(make_link(text, inner))
        links.append(make_link(text, match))
    for match in HTML_LINK.finditer(text):
        line = line_of(text, match.start())
        links.append(Link(line, "", match[2], match.start(2), picture=match[1] == "img"))
    return links


def make_link(text: str, match: re.Match) -> Link:
    """The link that LINK has found in the text."""
    line = line_of(text, match.start())
    return Link(line, match[2], match[3], match.start(3), picture=match[1] == "!")


# -------------------------------------------------------------------------------- links to a line


@functools.cache
def find_definitions(path: Path) -> dict[str, int]:
    """What can be linked to in a Python file: {"gae": 12, "Policy": 30, "Policy.forward": 41}."""
    lines = {}

    def add_all(nodes, prefix):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                lines.setdefault(prefix + node.name, node.lineno)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            lines.setdefault(prefix + name.id, node.lineno)
            if isinstance(node, ast.ClassDef) and not prefix:
                add_all(node.body, f"{node.name}.")
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                add_all(node.body, prefix)

    add_all(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return lines


def find_line(text: str, path: Path) -> int | None:
    """The line of what a link's text names, as "the estimator `ppo.gae()`"; None: no such name."""
    words = text.replace("`", "").replace("()", "").split()
    parts = words[-1].split(".") if words else [""]
    definitions = find_definitions(path)
    module = list(path.with_suffix("").parts)
    for length in (2, 1):
        name = ".".join(parts[-length:])
        before = parts[:-length]
        if name in definitions and (not before or before == module[-len(before) :]):
            return definitions[name]
    return None


def mend(text: str, page: Path) -> tuple[str, list[str]]:
    """The page's text with the right line numbers in its links, and what cannot be mended."""
    faults = []
    mended = ""
    end = 0  # of what has been copied
    for link in sorted(read_links(text), key=lambda link: link.start):
        file, _, part = link.target.partition("#")
        if not re.match(r"L\d", part) or is_elsewhere(link.target):
            continue
        where = f"{page.name}:{link.line}: [{' '.join(link.text.split())}]({link.target})"
        path = (page.parent / file).resolve()
        if not re.fullmatch(r"L\d+", part) or path.suffix != ".py":
            faults.append(f"{where}: a link to a line is written FILE.py#L123")
            continue
        if not path.is_file():
            faults.append(f"{where}: there is no such file")
            continue
        line = find_line(link.text, path)
        if line is None:
            faults.append(f"{where}: {file} defines no such name")
            continue
        mended += text[end : link.start] + f"{file}#L{line}"
        end = link.start + len(link.target)
    return mended + text[end:], faults


def is_elsewhere(target: str) -> bool:
    """Whether a link leads out of the repository: https://..., mailto:..."""
    return re.match(r"[a-z][a-z+.-]*:", target) is not None


def main():
    for page in find_pages():
        text = page.read_text(encoding="utf-8")
        mended, faults = mend(text, page)
        if mended != text:
            page.write_text(mended, encoding="utf-8")
            print(f"mended: {page.relative_to(REPO)}")
        for fault in faults:
            print(f"cannot mend: {page.parent.relative_to(REPO) / fault}")


if __name__ == "__main__":
    main()
