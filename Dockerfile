# An image with CUDA's torch and this package. It is documented, and not built by the tests: they have no container engine.
#   docker build -t gloria .
#   docker run --gpus all --ipc=host -v $PWD/data:/work/data -v $PWD/runs:/work/runs gloria \
#       torchrun --nproc_per_node 4 -m gloria.pretrain --config launch/gpt2-124m.toml
# --ipc=host: the ranks of a node share memory. TORCH_INDEX names the build (cpu, cu126, cu128, cu130).
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
# A C compiler, for the kernels that torch.compile makes.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY constraints.txt requirements.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch --index-url ${TORCH_INDEX}
COPY pyproject.toml README.md LICENSE ./
COPY gloria ./gloria
COPY launch ./launch
RUN pip install --no-cache-dir -c constraints.txt '.[parquet,data]'
CMD ["gloria", "--help"]
