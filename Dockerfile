# rankcast for a CUDA machine. torch's packages bring CUDA, so a plain Debian is enough; the driver comes
# from the host (nvidia-container-toolkit).
#
#   docker build -t rankcast .
#   docker run --gpus all --ipc host -v "$PWD:/work" -v ~/.cache/huggingface:/home/rankcast/.cache/huggingface \
#       rankcast train --config my.yaml
#
# Several GPUs: --entrypoint torchrun … --nproc_per_node 8 /opt/source/launch/train.py --config my.yaml
# Without GPUs: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
FROM debian:bookworm-slim
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Triton compiles launchers with gcc and Python's headers when a kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# ninja and DS_BUILD_OPS: DeepSpeed is a source package; none of its kernels are built or used.
ENV PATH=/opt/rankcast/bin:$PATH \
    DS_BUILD_OPS=0 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/source
COPY constraints.txt pyproject.toml README.md LICENSE ./
ARG TORCH_INDEX=
RUN python3 -m venv /opt/rankcast \
    && pip install -q -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
RUN pip install -q -c constraints.txt setuptools wheel packaging numpy psutil py-cpuinfo ninja \
        hjson msgpack pydantic tqdm einops \
    && pip install -q -c constraints.txt --no-build-isolation deepspeed
COPY adapters adapters
COPY trainer trainer
COPY launch launch
COPY configs configs
RUN pip install -q -c constraints.txt . \
    && useradd --create-home --uid 1000 rankcast \
    && mkdir /work \
    && chown rankcast /work

USER 1000
WORKDIR /work
RUN rankcast --help
ENTRYPOINT ["rankcast"]
