"""The pages of the documentation: every link leads somewhere, the site has every page, and the API page every name."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmopd

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *DOCS.rglob("*.md")})
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def text_of(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", text_of(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w -]", "", title).strip().replace(" ", "-") for title in plain}


def entries(nav: Any) -> list[str]:
    """Return the pages of a navigation, in order."""
    if isinstance(nav, dict):
        nav = list(nav.values())
    return [page for one in nav for page in entries(one)] if isinstance(nav, list) else [nav]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


def test_the_site_has_every_page_under_docs() -> None:
    listed = [
        str(path.relative_to(DOCS))
        for entry in entries(SITE["nav"])
        for path in (DOCS.glob(entry) if "*" in entry else [DOCS / entry])
    ]
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages - set(listed) == set(), "add them to `nav` of mkdocs.yml"
    assert len(listed) == len(set(listed))


def test_the_api_page_has_every_public_name_once() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: mmopd\.(\w+)$", page, re.MULTILINE)
    assert sorted(names) == sorted(mmopd.__all__)
