# The image that jobs run in (COMPRESS_CONTAINER of launch/env.sh): NVIDIA's torch, NCCL and Transformer Engine as they
# are, and the wheel on top.
#
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" -t compress .      then: enroot import -o compress.sqsh dockerd://compress
#
# Another base, such as one of your site's registry or one pinned by digest: --build-arg BASE=...
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3

FROM ${BASE} AS wheel
WORKDIR /src
COPY . .
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
COPY --from=wheel /wheels /wheels
COPY launch/install.sh /wheels/
RUN PIP_NO_CACHE_DIR=1 bash /wheels/install.sh "$(echo /wheels/compress-*.whl)" && rm -r /wheels

# NCCL says what is wrong and nothing else; a collective that hangs ends its process, and says where all ranks stood.
# Memory in segments that grow: batches of many lengths leave no holes.
ENV NCCL_DEBUG=WARN \
    TORCH_NCCL_ASYNC_ERROR_HANDLING=1 \
    TORCH_NCCL_DUMP_ON_TIMEOUT=1 \
    TORCH_FR_BUFFER_SIZE=2000 \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONFAULTHANDLER=1

RUN useradd --create-home --uid 10001 --shell /bin/bash compress
USER 10001
WORKDIR /home/compress
CMD ["python3", "-m", "compress", "--help"]

# The commit that is inside. The last step, so that a new commit alone leaves the ones above in the cache.
ARG REVISION=unknown
LABEL org.opencontainers.image.title="compress" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
