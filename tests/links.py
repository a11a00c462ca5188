"""Keeps the links from README.md to lines of the code right.

    python -m tests.links       writes the line of every function into its link

A link is written [`model.Router.choose`](model.py#L1): the name says where it has to lead. In a table the cell
behind the description of a file gets its length in the same way, and "N, five files" the sum.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/.]+\.py)#L\d+\)")
SUM = re.compile(r"[\d,]+(?=, five files)")
LENGTH = re.compile(r"(\[[^\]]+\]\(([\w/.]+\.py)\)[^|\n]*\|[^|\n]*\|\s*)(\d+)(?=\s*\|)")


def line_of(path: Path, names: list[str]) -> int:
    """The line on which a definition or constant, named from the outside in, begins. KeyError: it is not there."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        for node in body:
            is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
            targets = getattr(node, "targets", [])
            if is_definition or any(isinstance(each, ast.Name) and each.id == name for each in targets):
                body = getattr(node, "body", [])
                line = node.lineno
                break
        else:
            raise KeyError(f"{path.name} has no {'.'.join(names)}")
    return line


def with_lines(text: str) -> str:
    """The text with the number of every link to a line, and the length of every file, as they are now."""

    def link(match: re.Match) -> str:
        name, file = match.groups()
        module = file.removesuffix(".py").replace("/", ".")
        line = line_of(ROOT / file, name.removeprefix(module + ".").split("."))
        return f"[`{name}`]({file}#L{line})"

    def length(match: re.Match) -> str:
        lines = (ROOT / match.group(2)).read_text(encoding="utf-8").count("\n")
        return f"{match.group(1)}{lines}"

    text = LENGTH.sub(length, LINK.sub(link, text))
    return SUM.sub(f"{sum(int(found[3]) for found in LENGTH.finditer(text)):,}", text)


if __name__ == "__main__":
    for page in (ROOT / "README.md", ROOT / "tests" / "claims" / "README.md"):
        page.write_text(with_lines(page.read_text(encoding="utf-8")), encoding="utf-8")
