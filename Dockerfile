# An image for NVIDIA GPUs or, with --build-arg EXTRA=tpu, for TPU hosts:
#
#   docker build --tag guided-distill .
#   docker run --rm --gpus all --volume "$PWD:/work" guided-distill train --config configs/digits.py --workdir runs/digits
FROM python:3.12-slim

ARG EXTRA=cuda

COPY pyproject.toml requirements-dev.lock README.md LICENSE /source/
COPY guided_distill /source/guided_distill
COPY configs /source/configs
# JAX's wheels bring CUDA with them; the lock has the versions of everything else.
RUN pip install --no-cache-dir --constraint /source/requirements-dev.lock "/source[$EXTRA,report,text]"

WORKDIR /work
ENTRYPOINT ["guided-distill"]
CMD ["doctor"]
