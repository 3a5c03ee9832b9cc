"""One guarded child for all hostile cases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from guard import Guard


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    """Keep a child that opens what may be hostile."""
    with closing(Guard(tmp_path_factory.mktemp("guard"))) as made:
        yield made
