"""Fixtures that the tests of whole things share."""

from __future__ import annotations

from support.browser import browser, page

__all__ = ["browser", "page"]
