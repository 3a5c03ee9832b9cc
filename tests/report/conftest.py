"""A browser for the tests of this folder, and a visible skip without one."""

from __future__ import annotations

from collections.abc import Iterator

import browser as browsers
import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[browsers.Browser]:
    path = browsers.find()
    if path is None:
        pytest.skip("needs Chromium: apt install chromium")
    found = browsers.Browser(path)
    yield found
    found.close()
