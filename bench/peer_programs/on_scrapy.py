"""Scrapy: a spider of the URLs it is given, with an asynchronous item pipeline to PostgreSQL; crawls once and ends."""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import asyncpg
from scrapy import Request, Spider
from scrapy.crawler import CrawlerProcess
from scrapy.http import Response

SAVE = "INSERT INTO page (url, status, body) VALUES ($1, $2, $3)"


class PagesSpider(Spider):
    """Asks for each URL once."""

    name = "pages"

    def __init__(self, urls: Sequence[str], **more: Any) -> None:
        super().__init__(**more)
        self._urls = urls

    async def start(self) -> AsyncIterator[Request]:
        for url in self._urls:
            yield Request(url)

    def parse(self, response: Response) -> Iterator[dict[str, Any]]:
        yield {"url": response.url, "status": response.status, "body": response.body}


class StorePipeline:
    """Stores each item with a connection of a pool."""

    async def open_spider(self) -> None:
        self._database = await asyncpg.create_pool(os.environ["DATABASE_URL"])

    async def close_spider(self) -> None:
        await self._database.close()

    async def process_item(self, item: dict[str, Any]) -> dict[str, Any]:
        await self._database.execute(SAVE, item["url"], item["status"], item["body"])
        return item


def submit(urls: Sequence[str]) -> None:
    process = CrawlerProcess(
        {
            "CONCURRENT_REQUESTS": int(os.environ["IN_FLIGHT"]),
            "DOWNLOAD_DELAY": 0,
            "ROBOTSTXT_OBEY": False,
            "LOG_LEVEL": "WARNING",
            "ITEM_PIPELINES": {StorePipeline: 300},
        }
    )
    process.crawl(PagesSpider, urls=urls)
    process.start()
