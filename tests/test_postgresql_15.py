"""The path of a batch on the oldest PostgreSQL that will do, as Debian 12 brings it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import debian, web
from tests.services import data_folder, serving
from tests.test_path import answer, follow_a_batch

pytestmark = debian.needs_postgresql_15


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with data_folder() as folder:
        yield folder


async def test_the_path_of_a_batch_on_postgresql_15(data_dir: Path) -> None:
    async with (
        web.serving(answer) as site,
        debian.postgresql_15(data_dir.parent / "15") as url,
        serving(data_dir, DATABASE_URL=url) as service,
    ):
        await follow_a_batch(service, site)
