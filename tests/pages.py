"""README and documentation: their text and code blocks, by page."""

import re

from runs import REPOSITORY

FILES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = {str(file.relative_to(REPOSITORY)): file.read_text() for file in FILES}


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and code of every block in this language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page, code) for page, text in PAGES.items() for code in pattern.findall(text)]


def block(word: str, page: str, language: str = "python") -> str:
    """The only block of a page with this word in it."""
    (code,) = (code for where, code in blocks(language) if where == page and word in code)
    return code
