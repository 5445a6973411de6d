"""A page for a run: `index.html`, a single file that needs no network and no server. Its files:

content.py     what a page can show, as plain dataclasses; arrays are quantised here
template.html  its markup and style;  page.js  its behaviour
gather.py      reads a run folder into a `Page`
kept.py        what its files hold, bounded and typed
folders.py     pages of folders that hold several runs
"""

from .content import Clip, Curve, Map, Page, Picture, Series, Table, render

__all__ = ["Clip", "Curve", "Map", "Page", "Picture", "Series", "Table", "render"]
