# paft_merge in a container, for CPUs or NVIDIA GPUs (the driver and the NVIDIA container toolkit are the host's).
#
#   docker build -t paft-merge .                                            # torch with CUDA, as pip installs it on Linux
#   docker build -t paft-merge:cpu --build-arg TORCH_INDEX=URL .            # URL: PyTorch's index of CPU wheels (get-started page of PyTorch)
#   docker run --rm -v "$PWD:/data" paft-merge:cpu merge recipe.yaml out
#   docker run --rm --gpus all -v "$PWD:/data" paft-merge run recipe.yaml runs/first
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=
ARG EXTRAS=train,tune,plots

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tools/wheel_backend.py ./tools/
COPY paft_merge ./paft_merge
COPY recipes ./recipes
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[$EXTRAS]"

# The kernels for x86-64 processors with AVX2 or AVX-512 are in the package. For another processor, that of the machine that builds
# the image, they are compiled here.
ENV NUMBA_CACHE_DIR=/opt/paft-kernels
RUN python -m paft_merge.compute.kernels && mkdir -p "$NUMBA_CACHE_DIR" && chmod -R a+rwX "$NUMBA_CACHE_DIR"

WORKDIR /data
ENTRYPOINT ["paft"]
CMD ["--help"]
