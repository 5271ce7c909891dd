"""The directive ``gallery``: pages as cards, each with the first picture that its own cells have drawn."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Card(nodes.General, nodes.Element):
    """A page's place in a gallery, until all pages have been executed."""


class Gallery(SphinxDirective):
    """Names of pages of the same folder, a line each."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        folder = self.env.docname.rpartition("/")[0]
        names = [line.strip() for line in self.content if line.strip()]
        return [nodes.container("", *(Card(page=f"{folder}/{name}") for name in names), classes=["gallery"])]


def fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put picture and title, with a link, in the place of each card."""
    for card in list(doctree.findall(Card)):
        page = card["page"]
        target = app.builder.get_relative_uri(docname, page)
        title = app.env.titles[page].astext()
        pictures = [
            image.deepcopy()
            for output in app.env.get_doctree(page).findall(nodes.container)
            if output.get("nb_element") == "cell_code_output"
            for image in output.findall(nodes.image)
        ]
        content: list[nodes.Node] = []
        for image in pictures[:1]:
            image["alt"] = ""  # the title beside it says it
            content.append(nodes.reference("", "", image, internal=True, refuri=target))
        content.append(nodes.paragraph("", "", nodes.reference("", title, internal=True, refuri=target)))
        card.replace_self(nodes.container("", *content, classes=["card"]))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(Card)
    app.add_directive("gallery", Gallery)
    app.connect("doctree-resolved", fill)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
