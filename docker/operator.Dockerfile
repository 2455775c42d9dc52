# The operator, from the repository's root:
#   docker build -f docker/operator.Dockerfile -t kvserve/operator:0.1.0 .
FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY api api
COPY kernels kernels
COPY strategies strategies
COPY profiler profiler
COPY controller controller
COPY connector connector
COPY operator operator
COPY cli cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.11-slim
# the versions that are tested together; "-e ." in the lock is for a clone
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    --mount=type=bind,source=requirements/dev.lock,target=/lock/dev.lock \
    grep -v '^-e ' /lock/dev.lock > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "kvserve[operator] @ file://$(echo /dist/*.whl)" \
    && rm /tmp/constraints.txt
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
ENTRYPOINT ["kvserve", "operator"]
