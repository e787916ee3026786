# One image for `serve` (the default) and `worker`. It brings no PostgreSQL: set DATABASE_URL, and FETCHPOOL_API_TOKEN.
FROM python:3.13-slim AS build
COPY requirements.lock /
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --require-hashes -r /requirements.lock \
    && /venv/bin/pip uninstall --yes pip

FROM python:3.13-slim
COPY --from=build /venv /venv
COPY app /srv/fetchpool/app
COPY migrations /srv/fetchpool/migrations
ENV PATH=/venv/bin:$PATH PYTHONPATH=/srv/fetchpool PYTHONDONTWRITEBYTECODE=1 FETCHPOOL_HOST=0.0.0.0
USER 10001:10001
WORKDIR /srv/fetchpool
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "app.cli"]
CMD ["serve"]
