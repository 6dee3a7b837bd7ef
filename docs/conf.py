"""Sphinx: `make docs`. Nothing is fetched while building, nor by the pages when they are read."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "extensions"), str(Path(__file__).parents[1])]

import bayesdl  # noqa: E402

project = "bayesdl"
author = "The bayesdl authors"
copyright = "the bayesdl authors, Apache-2.0"
release = version = bayesdl.__version__

extensions = [
    *("sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"),
    *("mathml", "plain_docstrings", "generated_pages"),
]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "generated/metrics.md"]  # the last is included elsewhere

html_theme = "furo"
html_title = f"bayesdl {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# BAYESDL_DOCS_EXECUTE=1 runs the tutorials and shows what they print; without it their code is shown alone.
nb_execution_mode = "force" if os.environ.get("BAYESDL_DOCS_EXECUTE") == "1" else "off"
if nb_execution_mode == "force":  # kernels take their backend from here, and only this one puts figures on the page
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
nb_output_stderr = "remove"  # progress bars and warnings of other libraries
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# optional packages, which the build needs none of
autodoc_mock_imports = [
    *("accelerate", "arviz", "backpack", "botorch", "gpytorch", "laplace", "lightning", "pandas", "peft"),
    *("skorch", "torchmetrics", "transformers"),
]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# words of docstrings that several classes have as an attribute
suppress_warnings = ["ref.python"]
python_maximum_signature_line_length = 100
toc_object_entries = False
