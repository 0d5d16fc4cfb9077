# Three images, one target each: cpu, gpu, openvino. How to build and run them: docs/containers.md.

# A Debian image with Python 3.11 or later and its venv module. By digest it stays the same to the
# byte: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.12.13-slim-trixie
# What lies in /bundle: nothing (none), or the model of JOB (export; see the stage model-export).
ARG MODEL=none


# ---- building: a virtual environment per flavour, and none of the tools that filled it -----------

FROM ${PYTHON_IMAGE} AS build
COPY .docker/build.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes -r /requirements/build.txt \
    && python3 -m venv --without-pip /opt/batchclf
# What comes after this pip is installed into the image's environment, and compiled to bytecode:
# a read-only root has no place for it later.
ENV PIP="/opt/build/bin/pip --python /opt/batchclf/bin/python"

FROM build AS wheel
# The compiler stays in this stage. Official Python images have Python.h, Debian's own Python has not.
RUN headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
       $(test -e "$headers/Python.h" || echo libpython3-dev) \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
# Without its extension the wheel would be built as well, and be slower.
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheel /source \
    && python3 -m zipfile --extract /wheel/*.whl /tmp/wheel \
    && cd /tmp/wheel/batchclf/images && python3 -c 'import _resize'

FROM build AS build-cpu
COPY .docker/cpu.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    $PIP install --require-hashes -r /requirements/cpu.txt
COPY --from=wheel /wheel /wheel
RUN $PIP install --no-deps /wheel/*.whl

FROM build AS build-gpu
COPY .docker/gpu.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    $PIP install --require-hashes -r /requirements/gpu.txt
COPY --from=wheel /wheel /wheel
RUN $PIP install --no-deps /wheel/*.whl

FROM build AS build-openvino
COPY .docker/openvino.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    $PIP install --require-hashes -r /requirements/openvino.txt
COPY --from=wheel /wheel /wheel
RUN $PIP install --no-deps /wheel/*.whl


# ---- the model: torch stays in this stage --------------------------------------------------------

FROM scratch AS model-none
WORKDIR /bundle

FROM build AS model-export
COPY .docker/export.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    $PIP install --require-hashes -r /requirements/export.txt
COPY --from=wheel /wheel /wheel
RUN $PIP install --no-deps /wheel/*.whl
COPY jobs /source/jobs
COPY samples /source/samples
# A job file in jobs/; its own weights or ONNX file lie there too.
ARG JOB=jobs/sample.yaml
RUN /opt/batchclf/bin/batchclf export "/source/$JOB" /bundle

FROM model-${MODEL} AS model


# ---- running: any user, a read-only root, everything that is written on volumes ------------------

FROM ${PYTHON_IMAGE} AS runtime
LABEL org.opencontainers.image.title="batchclf" \
      org.opencontainers.image.description="Classifies folders of images, one record per image" \
      org.opencontainers.image.licenses="Apache-2.0"
# Official Python images come without the standard library's bytecode, and no later user can add it.
RUN python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))' \
    | xargs python3 -m compileall -q -x '/(site-packages|idlelib|lib2to3|tkinter|turtledemo)/' \
    && mkdir --mode=1777 /cache
# HOME: of a user who is in no passwd file. ONNX Runtime reports its use to its maker unless told.
ENV PATH=/opt/batchclf/bin:$PATH \
    HOME=/tmp \
    BATCHCLF_CACHE_DIR=/cache \
    ORT_DISABLE_TELEMETRY=1
# Engines keep volumes writable where the root is not.
VOLUME /cache /tmp
WORKDIR /data
ENTRYPOINT ["batchclf"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/batchclf /opt/batchclf
COPY --from=model /bundle /bundle
USER 65532:65532

FROM runtime AS gpu
# The driver is the host's, lent by the NVIDIA container toolkit; CUDA and cuDNN came as wheels.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/batchclf /opt/batchclf
COPY --from=model /bundle /bundle
USER 65532:65532

FROM runtime AS openvino
# Intel's compute runtime for its GPUs: auto (where this Debian has it), 1 (must be had), 0 (not).
ARG INTEL_GPU=auto
RUN set -eu; \
    case "$INTEL_GPU" in auto|1) ;; 0) exit 0 ;; *) \
        echo "INTEL_GPU: found $INTEL_GPU; allowed: auto, 1, 0" >&2; exit 1 ;; esac; \
    apt-get update; \
    if apt-get install --simulate intel-opencl-icd >/dev/null 2>&1; then \
        apt-get install --yes --no-install-recommends intel-opencl-icd; \
    else \
        . /etc/os-release; \
        echo "$PRETTY_NAME has no package intel-opencl-icd: an image for Intel CPUs only." \
             "For Intel GPUs: --build-arg PYTHON_IMAGE=python:3.12.13-slim-bookworm" >&2; \
        [ "$INTEL_GPU" = auto ]; \
    fi; \
    rm -rf /var/cache/apt/* /var/lib/apt/lists/*
COPY --from=build-openvino /opt/batchclf /opt/batchclf
COPY --from=model /bundle /bundle
USER 65532:65532
