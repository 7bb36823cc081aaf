"""Settings of the documentation site: make docs."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from kdfast.version import __version__  # noqa: E402

project = "kdfast"
author = "the kdfast authors"
copyright = "the kdfast authors, MIT license"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_extension"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which annotations do not
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"
highlight_language = "none"
smartquotes = False
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]  # argument types are words, not links
add_module_names = False

html_theme = "furo"
html_title = f"kdfast {release}"
html_static_path = ["static"]
html_css_files = ["kdfast.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
