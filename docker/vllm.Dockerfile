# The serving image: vLLM with the connector, and the router, from the repository's root:
#   docker build -f docker/vllm.Dockerfile -t kvserve/vllm:0.1.0 .
# Any image of vLLM 0.32 whose Python is 3.11 or later; for machines without a GPU one that was built for CPUs.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM python:3.11-slim AS wheel
# for the native kernels; without a compiler the wheel has none and numba does their work
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
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

FROM ${VLLM_IMAGE}
USER root
# what vLLM was tested with stays as it is; only what is missing is added
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    python3 -m pip freeze | grep -iE '^(vllm[a-z-]*|torch|triton|transformers|numpy|numba|llvmlite|safetensors)==' > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt \
       "kvserve[connector] @ file://$(echo /dist/*.whl)" vllm-router==0.1.17 \
    && rm /tmp/constraints.txt
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server"]
