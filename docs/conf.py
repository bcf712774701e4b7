"""The documentation: python -m sphinx -W --keep-going -b html docs docs/_build"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]
# The kernels of the examples' pages inherit these.
os.environ |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
os.environ["PYTHONPATH"] = str(HERE.parent)

# Before anything imports nnsight, which adds `.save` to every Python object.
import beartype  # noqa: E402, F401

project = "mm-interp"
author = "the mm-interp project"
copyright = "the mm-interp project, MIT licence"
version = release = version_of("mm-interp")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "docstrings",
    "example_pages",
    "local_assets",
    "shown_output",
]
exclude_patterns = ["_build", "_generated", "extensions", "jupyter_execute", "tables"]

# ---- pages ----
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_cache_path = str(HERE / "_generated" / "notebooks")
nb_execution_timeout = 240
nb_execution_show_tb = True
nb_output_stderr = "remove"
nb_merge_streams = True
nb_ipywidgets_js = {}  # They would be fetched.

# ---- reference ----
add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
# Inventories are read from files beside this one, never from the network; without them names stay plain text.
_SITES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "transformers": "https://huggingface.co/docs/transformers/main/en/",
    "diffusers": "https://huggingface.co/docs/diffusers/main/en/",
    "nnsight": "https://nnsight.net/",
}
_INVENTORIES = {name: HERE / "inventories" / f"{name}.inv" for name in _SITES}
intersphinx_mapping = {
    name: (url, str(_INVENTORIES[name])) for name, url in _SITES.items() if _INVENTORIES[name].exists()
}

# ---- looks: every asset is local ----
html_theme = "furo"
html_title = "mm-interp"
html_static_path = ["static"]
html_css_files = ["mm-interp.css"]
html_copy_source = False
html_show_sourcelink = False
