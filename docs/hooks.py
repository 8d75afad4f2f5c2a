"""Hooks of the docs site (mkdocs.yml): pages from other folders of the repository, and links that work in both places.

A page links as the repository has it, so that it can be read there too. A link to a file that is not on the site, such
as a module, becomes plain text.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks")  # a warning there fails `mkdocs build --strict`

ROOT = Path(__file__).parents[1]
# Page of the site -> its file.
FROM = {
    "start.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "tasks.md": "modalities/README.md",
    "data.md": "data/README.md",
    "suites.md": "eval/README.md",
    "examples.md": "examples/README.md",
}
PAGES = {file: page for page, file in FROM.items()}
# A fence, which has no links; or an image or a link: its text, and its target.
LINK = re.compile(r"^( *)```.*?^\1```|(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace `FOLDER/*` in the navigation by the pages of the folder."""
    config.nav = _listed(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from other folders."""
    for page, file in FROM.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to pages of the site."""
    here = page.file.src_uri
    folder = ROOT / FROM[here] if here in FROM else ROOT / "docs" / here

    def point(match: re.Match[str]) -> str:
        _, image, text, target = match.groups()
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        file = os.path.relpath(os.path.normpath(folder.parent / path), ROOT)
        uri = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else "")
        if not files.get_file_from_path(uri):
            if not (ROOT / file).exists():
                log.warning("%s: there is no %s", folder.relative_to(ROOT), target)
            return text
        return f"{image}[{text}]({os.path.relpath(uri, Path(here).parent)}{'#' * bool(anchor)}{anchor})"

    return LINK.sub(point, markdown)


def _listed(nav: Any) -> Any:
    if isinstance(nav, list):
        return [_listed(one) for one in nav]
    if isinstance(nav, dict):
        return {title: _listed(one) for title, one in nav.items()}
    if isinstance(nav, str) and nav.endswith("/*"):
        return sorted(f"{nav[:-1]}{path.name}" for path in (ROOT / "docs" / nav[:-2]).glob("*.md"))
    return nav
