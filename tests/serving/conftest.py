"""Fixtures that the tests of the server share."""

from __future__ import annotations

from support.browser import browser, page

__all__ = ["browser", "page"]
