"""Sphinx settings. Build the pages with `.venv/bin/sphinx-build -W docs outputs/docs`; every warning is an error."""

import hf_mae

project = "hf_mae"
author = "the hf_mae authors"
copyright = "the hf_mae authors, Apache-2.0"
release = hf_mae.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hf_mae {release}"

# Headings of depth 1 to 3 get GitHub's anchors, so that links work on GitHub and here.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
