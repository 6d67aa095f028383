# Mergeflow with a CPU build of torch. To choose the index that it comes from, as PyTorch's installation page names it:
#     docker build --build-arg PIP_EXTRA_INDEX_URL=... --tag mergeflow .
# To merge what lies in /data; Ray's object store (80 MiB, nearly unused) needs more than the 64 MB of shared memory
# that Docker gives, or executor=local:
#     docker run --rm --shm-size=256m --volume /data:/data mergeflow models=... models.dir=/data/... out=/data/merged
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app

# torch first, as in the Makefile; and before the sources, so that a change of them does not repeat it.
ARG PIP_EXTRA_INDEX_URL=""
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE launch.py ./
COPY conf ./conf
COPY mergeflow ./mergeflow
COPY hydra_plugins ./hydra_plugins
RUN pip install --constraint constraints.txt --editable .

# A user without privileges. `docker run --user` may name any other: the home and the working directory are open to
# all, and USER tells a name to libraries that would look the number up.
RUN useradd --create-home --uid 1000 mergeflow && chmod 0777 /home/mergeflow /app
ENV HOME=/home/mergeflow \
    USER=mergeflow
USER mergeflow

ENTRYPOINT ["python", "launch.py"]
