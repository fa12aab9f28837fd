"""How Sphinx makes the documentation: `make docs`."""

from pathlib import Path

from sphinx.application import Sphinx

import scistream_flows

project = "scistream-flows"
author = "the scistream-flows developers"
copyright = "the scistream-flows developers, Apache-2.0"  # noqa: A001 - Sphinx names it so
release = scistream_flows.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"scistream-flows {release}"

myst_heading_anchors = (
    3  # pages link to headings by the anchors that they have where Markdown is shown as it is
)
default_role = "code"  # docstrings write code as Markdown does

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# Pages that live outside this folder, where people look for them first, are included by these pages here.
ELSEWHERE = {"../SECURITY.md": "security.md", "../CHANGELOG.md": "changelog.md", "../README.md": "index.md"}


def lead_to_pages(_app: Sphinx, _page: str, content: list[str]) -> None:
    """Make links between Markdown files, which work in the repository, lead to pages of this documentation."""
    for link, page in ELSEWHERE.items():
        content[0] = content[0].replace(f"]({link}", f"]({page}")


def lead_back(_app: Sphinx, _path: Path, _page: str, content: list[str]) -> None:
    """The same for what is included from the folder above."""
    content[0] = content[0].replace("](docs/", "](").replace("](examples/", "](../examples/")


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("source-read", lead_to_pages)
    app.connect("include-read", lead_back)
