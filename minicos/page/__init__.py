"""One page for a run: `index.html`, a single file that needs no network and no server.

content.py     what a page can show, as plain dataclasses; arrays are quantised here
template.html  its markup and style;  page.js  its behaviour
gather.py      reads a run folder into a `Page`
"""

from .content import Clip, Curve, Map, Mark, Page, Series, render

__all__ = ["Clip", "Curve", "Map", "Mark", "Page", "Series", "render"]
