# paft_merge in a container, for CPUs or NVIDIA GPUs (the driver and the NVIDIA container toolkit are the host's).
#
#   docker build -t paft-merge .
#   docker build -t paft-merge:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker run --rm -v "$PWD:/work" paft-merge merge recipe.yaml out
#   docker run --rm --gpus all -v "$PWD:/work" paft-merge:cuda run recipe.yaml runs/first
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=train,tune,plots

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY paft_merge ./paft_merge
COPY recipes ./recipes
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" ".[$EXTRAS]"

# Kernels are compiled ahead for the processor of the machine that builds the image; another processor compiles them once more.
ENV NUMBA_CACHE_DIR=/opt/paft-kernels
RUN python -m paft_merge.compute.kernels && chmod -R a+rwX "$NUMBA_CACHE_DIR"

WORKDIR /work
ENTRYPOINT ["paft"]
CMD ["--help"]
