# GPU workers: training and engines. From the repository's root:
#   docker build -f k8s/docker/gpu.Dockerfile --build-arg GIT_SHA=$(git rev-parse HEAD) -t REGISTRY/understudy:0.1.0-gpu .
# The packages are those of `.[gpu]` at the versions of constraints-gpu.txt; CUDA comes with torch's wheel, the driver with the
# node. About 10 GB.
FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY k8s/docker/constraints-gpu.txt ./
# deepspeed is built against the torch that is already there.
RUN pip install --constraint constraints-gpu.txt torch==2.13.0 setuptools wheel
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY cluster cluster
COPY training training
COPY serving serving
COPY jobs jobs
RUN pip install --constraint constraints-gpu.txt --no-build-isolation ".[gpu]"

FROM python:3.11.13-slim-bookworm
# Triton compiles the launchers of its kernels when they are first used; libnuma1 and wget as in cpu.Dockerfile.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 wget && rm -rf /var/lib/apt/lists/*
# Into /usr/local, which is also on the PATH of the login shells that KubeRay may start Ray in.
COPY --from=build /usr/local /usr/local
RUN groupadd --gid 1000 understudy && useradd --uid 1000 --gid 1000 --create-home understudy
ARG GIT_SHA=
# The root file system is read-only where this runs: no bytecode is written, and HOME and /tmp are mounts. The last two are
# read by NVIDIA's container runtime.
ENV HOME=/home/understudy PYTHONDONTWRITEBYTECODE=1 UNDERSTUDY_GIT_SHA=$GIT_SHA
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/understudy
CMD ["understudy", "--help"]
