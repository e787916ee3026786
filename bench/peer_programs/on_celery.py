"""Celery: a task that blocks, for its pool of threads, with clients that threads may share; and what submits to it."""

import os
from collections.abc import Sequence

import urllib3
from celery import Celery, group
from celery.signals import worker_init
from psycopg_pool import ConnectionPool

IN_FLIGHT = int(os.environ["IN_FLIGHT"])
SAVE = "INSERT INTO page (url, status, body) VALUES (%s, %s, %s)"

app = Celery("pages", broker=f"redis://127.0.0.1:{os.environ['REDIS_PORT']}/0")
app.conf.task_ignore_result = True

web = urllib3.PoolManager(num_pools=IN_FLIGHT, maxsize=IN_FLIGHT)
database = ConnectionPool(os.environ["DATABASE_URL"], min_size=1, max_size=10, open=False)


@worker_init.connect
def connect(**_: object) -> None:
    database.open()


@app.task
def keep_page(url: str) -> None:
    response = web.request("GET", url)
    with database.connection() as connection:
        connection.execute(SAVE, (url, response.status, response.data))


def submit(urls: Sequence[str]) -> None:
    group(keep_page.s(url) for url in urls).apply_async()
