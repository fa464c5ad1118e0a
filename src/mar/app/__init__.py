"""The studio: a web page where one watches a picture grow, paints over it and changes it.

`studio.py` draws, without knowing of the web; `server.py` is its API and `guard.py` the API's doorkeeper; `static/` is
the page. The page keeps its pictures itself: the server keeps nothing of a request after its answer.
"""

from __future__ import annotations

from mar.app.server import launch

__all__ = ["launch"]
