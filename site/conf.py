"""Settings of Sphinx for the site. build.py makes the source folder and starts Sphinx."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from repository import repository_url, version  # noqa: E402

project = "minivllm"
author = "the authors of minivllm"
project_copyright = "the authors of minivllm, Apache-2.0"
release = version = version()
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "mathml", "docstrings"]
root_doc = "index"
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}

# --- notebooks: what is committed is shown, and nothing is run ------------------------------------

nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_output_stderr = "show"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
# A formula may stand beside digits and in the middle of a word.
myst_dmath_double_inline = True

# --- the reference --------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
#: In a docstring, `name` is a link if the reference has this name, and code otherwise.
default_role = "py:obj"

# --- the page -------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "minivllm"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_math_renderer = "mathml"
html_context = {"default_mode": "auto"}
html_theme_options: dict[str, Any] = {
    "show_navbar_depth": 2,
    "max_navbar_depth": 3,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    # The sidebar and the line above the text have all that the bar at the top would repeat.
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    # The player on the front page needs the width.
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
if url := repository_url():
    html_theme_options |= {"repository_url": url, "use_repository_button": True}
# Outputs are not for copying.
copybutton_selector = "div.highlight pre:not(.cell_output pre)"
