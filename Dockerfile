# upcycle in a container, for CPUs or for CUDA devices:
#   docker build -t upcycle .
#   docker build -t upcycle:cuda --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm -v "$PWD:/work" upcycle convert demo OUT --experts 4 --top-k 2
ARG BASE=ubuntu:24.04
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=all
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# A C++ compiler: kernels for the CPU, and DeepSpeed's operations, are compiled when first used. Versions are those of the base's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/upcycle
ENV PATH=/opt/upcycle/bin:$PATH

WORKDIR /opt/source
COPY . .
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" torch \
    && pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && rm -rf /opt/source

# Not root, so that what it writes into a mounted folder is its user's: docker run --user "$(id -u):$(id -g)"
RUN useradd --create-home upcycle
USER upcycle
ENV HF_HOME=/home/upcycle/.cache/huggingface
WORKDIR /work
ENTRYPOINT ["upcycle"]
CMD ["--help"]
