"""Sphinx configuration. The build reads nothing from the network."""

import sys
from pathlib import Path

import fastapi  # noqa: F401  # fails while autodoc sets typing.TYPE_CHECKING

import spa3r

sys.path.insert(0, str(Path(__file__).parent))  # figures.py

project = "spa3r"
author = "The spa3r authors"
copyright = author
version = release = spa3r.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "figures"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "literal"
add_module_names = False
autodoc_mock_imports = ["gradio"]  # an extra of its own
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "spa3r"
html_static_path = ["_static"]
html_css_files = ["spa3r.css"]
html_copy_source = False
html_show_sphinx = False


def before_napoleon(app, what, name, obj, options, lines):
    """Napoleon takes what stands before a colon in a property's first line for its type."""
    if what == "property" and lines:
        lines[0] = lines[0].replace(": ", " – ", 1)


def own_fields(app, what, name, obj, options, signature, return_annotation):
    """Leave the fields that every configuration of transformers has out of ours."""
    if what == "class" and name.endswith("Config") and signature and "*, " in signature:
        signature = "(" + signature.partition("*, ")[2]
    return signature, return_annotation


def setup(app):
    """Sphinx's entry."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=100)
    app.connect("autodoc-process-signature", own_fields)
