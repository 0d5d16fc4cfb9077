"""The job's provider, opened and proven: sessions on it that give the model's own answers."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path

from batchclf.errors import EnvironmentFailed, ProviderError, UsageError
from batchclf.images.prefetch import HostMemory
from batchclf.models.bundle import Bundle, cache_folder, digest_of, private_folder
from batchclf.models.checks import sample_pixels, tiled
from batchclf.models.golden import check_golden
from batchclf.models.resolve import Log, ResolvedModel, confirm_batch_size
from batchclf.models.variants import Conversion, needed_variant, resolve_variant
from batchclf.results.records import (
    ActiveProvider,
    Part,
    Precision,
    PrecisionCheck,
    precision_name,
)
from batchclf.runtime.classifier import (
    OnnxClassifier,
    open_classifier,
    open_reference,
    warm_up,
)
from batchclf.runtime.openvino import DEFAULT_DEVICE, device_names, require_cpu_precision
from batchclf.runtime.parts import InParts
from batchclf.runtime.probe import require_working
from batchclf.runtime.providers import (
    PROVIDERS,
    installed_flavours,
    require_precision,
    require_provider,
)
from batchclf.runtime.sessions import Target
from batchclf.sessions.kept import remembered
from batchclf.sessions.part import Fastest, fastest_part, largest_part, require_part
from batchclf.sessions.precision import (
    Speed,
    compare_precisions,
    measure_speed,
    require_agreement,
)
from batchclf.sessions.sample import Sample
from batchclf.sessions.together import together
from batchclf.spec.job import JobSpec, ProviderSpec, auto, gpus_of, has_processes, runs_on_cpu
from batchclf.system.apart import Apart, Ended, LeftBehind, NotStarted
from batchclf.system.machine import cpu_name_and_flags, usable_cores

MAX_CPU_STREAMS = 8
SETTLE_S = 120.0
"""Seconds that a provider may take to be proven, with all that it loads."""
RELEASE_S = 30.0
"""Seconds that a process may take to end which tried devices: until then it holds them."""
DEVICE_STREAMS = 2
"""Batches in flight on an accelerator: one is copied while another is computed."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What classifies: one classifier per stream, and what was proven of them."""

    classifiers: Sequence[InParts]
    part: Part
    """What each of them infers at once."""
    provider: ActiveProvider
    bundle: Bundle
    """The model at the job's precision."""
    memory: HostMemory
    """What the batches lie in, as the device likes it best."""
    precision_check: PrecisionCheck | None
    """Of the device that agrees least; None at fp32."""


def settle_job(job: JobSpec, log: Log) -> str | None:
    """Prove a job's provider before any other work: several GPUs are for processes to come.

    Returns, raises: as `settle_provider` or `settle_apart`.
    """
    settle = settle_apart if has_processes(job.provider) else settle_provider
    return settle(job, log)


def settle_provider(job: JobSpec, log: Log) -> str | None:
    """Prove that the job's provider works here, before any other work; takes seconds at most.

    Returns:
        Why it does not, where the job allows the CPU in its place; None: it works.

    Raises:
        ProviderError: it does not work, with the cause and what mends it.
        UsageError: the provider cannot do what the job asks of it.
    """
    require_precision(job.provider.name, job.precision)
    require_part(job)
    try:
        require_working(targets(job.provider, job))
    except ProviderError as error:
        return _allowed_fallback(job, error, log)
    return None


def settle_apart(job: JobSpec, log: Log) -> str | None:
    """The same, in a process that ends with it: its devices are for others to hold.

    One that is for one process at a time (compute mode EXCLUSIVE_PROCESS) could not be had else.

    Raises:
        ProviderError: it does not work, or whoever tries it dies or hangs, and no fall-back is
            allowed.
        EnvironmentFailed: no process is to be had.
        Exception: as `settle_provider`.
    """
    try:
        with Apart(RELEASE_S) as apart:
            fallback, said = apart.do(SETTLE_S, _settle_and_tell, job)
    except NotStarted as error:
        raise EnvironmentFailed(
            f"provider {job.provider.name}: its devices are tried in a process of its own, and "
            f"{error.strerror}; run again to resume"
        ) from error
    except (LeftBehind, Ended) as error:
        hangs = isinstance(error, LeftBehind)
        why = f"takes longer than {SETTLE_S:g} s" if hangs else f"fails: {error.strerror}"
        refusal = ProviderError(
            f"provider {job.provider.name}: trying its devices {why}; try them one by one "
            "(provider.devices), and see the kernel's log"
        )
        refusal.__cause__ = error
        return _allowed_fallback(job, refusal, log)
    for line in said:
        log(line)
    return fallback


def _settle_and_tell(job: JobSpec) -> tuple[str | None, list[str]]:
    said: list[str] = []
    return settle_provider(job, said.append), said


def _allowed_fallback(job: JobSpec, error: ProviderError, log: Log) -> str:
    if not job.provider.allow_fallback or job.provider.name == "cpu":
        raise error
    if job.precision not in PROVIDERS["cpu"].precisions:
        raise ProviderError(
            f"{error}\n  provider.allow_fallback: the CPU does not run {job.precision} either"
        ) from error
    log(f"FALLING BACK TO THE CPU, as provider.allow_fallback allows: {error}")
    return str(error)


def targets(provider: ProviderSpec, job: JobSpec) -> list[Target]:
    """Where the job's sessions are to open: one target per device, with its streams and threads.

    Raises:
        ProviderError: the installed ONNX Runtime does not have the provider.
    """
    cores = usable_cores()
    found = require_provider(provider.name)
    device_type = provider.device_type or DEFAULT_DEVICE
    if found.name == "openvino":
        for name in device_names(device_type):
            require_cpu_precision(name, job.precision, cpu_name_and_flags()[1])
    usual = min(cores, MAX_CPU_STREAMS) if runs_on_cpu(provider) else DEVICE_STREAMS
    streams = auto(job.runtime.streams, usual)
    target = Target(
        found,
        precision=job.precision,
        device_type=device_type,
        options=_options(provider),
        streams=streams,
        threads=auto(job.runtime.threads, max(1, cores // streams)),
        may_leave_nodes=provider.allow_fallback,
    )
    return [replace(target, device_id=number) for number in gpus_of(provider) or (0,)]


def _as_text(value: object) -> str:
    """An option as ONNX Runtime reads it: OpenVINO's provider takes no 1 for true."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Sessions to be opened: for which job and model, and in what batches."""

    job: JobSpec
    model: ResolvedModel
    batch_size: int
    """Rows of a batch, whatever is in them."""
    sample: Sample
    """Images of the job's own; needed at a reduced precision."""
    log: Log
    used: str | None = None
    """Digest of the converted model that the job began with, to go on with."""


def open_devices(wanted: Wanted, fallback: str | None) -> Opened:
    """Open the sessions of a job and compare each with the model's reference answers.

    `fallback` is what `settle_provider` returned.

    Raises:
        ProviderError: a session does not run on its device, or gives other answers there.
        PrecisionRefused: a reduced precision agrees too seldom with fp32.
        ModelError: the model cannot be converted to the precision.
    """
    job = wanted.job
    if fallback is None:
        try:
            return _open(wanted, job.provider)
        except ProviderError as error:
            fallback = _allowed_fallback(job, error, wanted.log)
    opened = _open(wanted, ProviderSpec(name="cpu"))
    provider = replace(opened.provider, requested=job.provider.name, fallback=fallback)
    return replace(opened, provider=provider)


def _open(wanted: Wanted, spec: ProviderSpec) -> Opened:
    job, bundle = wanted.job, wanted.model.bundle
    if (precision := needed_variant(spec.name, job.precision)) is not None:
        bundle = resolve_variant(bundle, precision, conversion_of(wanted))
    classifiers: list[InParts] = []
    check = None
    for target in targets(spec, job):
        opened, part = open_in_parts(wanted, bundle, target)
        _log_cpu_nodes(opened[0].active, wanted.log)
        _log_idle_units(target, opened[0].active, wanted.log)
        if _rounding(target) != "fp32":
            found = _check_precision(wanted, bundle, target, opened[0], part)
            check = found if check is None else min(check, found, key=attrgetter("top1_agreement"))
        classifiers += opened
    return Opened(
        classifiers,
        part,
        together([(one.active.device, one.active) for one in classifiers]),
        bundle,
        _host_memory(spec, wanted.log),
        precision_check=check,
    )


def may_need_sample(job: JobSpec) -> bool:
    """Whether a sample may be needed to open a job's sessions, on whichever machine."""
    if job.precision != "fp32" or job.provider.name != "cuda":
        return job.precision != "fp32"
    from batchclf.runtime.cuda import asks_for_tf32

    return asks_for_tf32(_options(job.provider))


def conversion_of(wanted: Wanted) -> Conversion:
    """How a model is converted here to another precision."""
    return Conversion(
        sample=lambda: wanted.sample.pixels,
        sample_digest=lambda: wanted.sample.digest,
        open_reference=open_reference,
        threads=usable_cores(),
        made_by=installed_flavours(),
        log=wanted.log,
        used=wanted.used,
    )


def _log_cpu_nodes(active: ActiveProvider, log: Log) -> None:
    if active.fallback is not None:
        log(
            f"FALLING BACK TO THE CPU IN PART, as provider.allow_fallback allows: {active.fallback}"
        )
    elif active.cpu_nodes:
        some = ", ".join(active.cpu_nodes[:5])
        log(f"provider {active.requested}: shapes are computed on the CPU: {some}")


def _log_idle_units(target: Target, active: ActiveProvider, log: Log) -> None:
    if target.provider.name == "cuda":
        from batchclf.runtime.cuda import idle_tensor_cores
        from batchclf.runtime.cuda_machine import architecture_of

        architecture = architecture_of(target.device_id)
        if loss := idle_tensor_cores(active.options, target.precision, architecture):
            log(f"provider cuda: {loss}")


def open_in_parts(wanted: Wanted, bundle: Bundle, target: Target) -> tuple[list[InParts], Part]:
    """A classifier per stream of a target, and what each of them infers at once.

    Raises:
        ProviderError: a session does not run, or gives other answers.
        ModelError: the model gives other answers with another number of images.
        UsageError: the job asks for a part that the model does not take.
    """
    any_size = _open_target(bundle, target, None) if target.provider.name == "cpu" else None

    def in_parts(size: int) -> list[InParts]:
        sessions = any_size or _open_target(bundle, target, size)
        return [InParts(one, size, wanted.log) for one in sessions]

    part = _choose_part(wanted, bundle, target, in_parts)
    # Int8 rounds otherwise in batches of other sizes; its comparison with fp32 sees what matters.
    if any_size is not None and target.precision == "fp32":
        confirm_batch_size(bundle, part.num_images, any_size[0])
    return in_parts(part.num_images), part


def _choose_part(
    wanted: Wanted, bundle: Bundle, target: Target, in_parts: Callable[[int], list[InParts]]
) -> Part:
    """What the model or the device wants, what the job asks for, or what is fastest here.

    Raises:
        UsageError: the job asks for a part that the model does not take.
    """
    fixed, asked = bundle.meta.fixed_batch, wanted.job.runtime.part
    if fixed is not None and asked not in ("auto", fixed):
        raise UsageError(
            f"runtime.part: found {asked}, but {bundle.meta.name} takes {fixed} at once: leave it "
            "out"
        )
    if fixed is not None or not _is_cpu(target):
        return Part(fixed or wanted.batch_size, "whole")
    if asked != "auto":
        return Part(min(asked, wanted.batch_size), "asked")
    if (largest := largest_part(wanted.batch_size)) == 1:
        return Part(1, "whole")

    def measure() -> Fastest:
        pixels_NHWC = tiled(sample_pixels(*bundle.meta.preprocess.crop), largest)
        return fastest_part(in_parts, pixels_NHWC, by_cpu=target.threads == 1)

    key = (_what_answers(bundle, target), _machine(target), largest)
    found, is_known = remembered("parts", key, Fastest, measure)
    size = found.num_images
    if is_known:
        return Part(size, "remembered")
    costs = ", ".join(
        f"{cost_ms:,.3g} in parts of {tried}" for tried, cost_ms in found.tried.items()
    )
    wanted.log(f"inferring in parts of {size}, as is fastest here (ms an image: {costs})")
    return Part(size, "measured")


def _is_cpu(target: Target) -> bool:
    return target.provider.name == "cpu" or (
        target.provider.name == "openvino" and target.device_type == DEFAULT_DEVICE
    )


def _machine(target: Target) -> tuple[object, ...]:
    """What the time of a session on the CPU depends on, its model apart."""
    return (*_cpu(), usable_cores(), target.streams, target.threads)


def _cpu() -> tuple[str, list[str]]:
    name, flags = cpu_name_and_flags()
    return name, sorted(flags)


def _open_target(bundle: Bundle, target: Target, size: int | None) -> list[OnnxClassifier]:
    """A session per stream, compared with the bundle's golden answers.

    `size`: images that each infers at once; None: any number, or the model's own.
    """
    name = target.provider.name
    on_cpu = name == "cpu"
    # One-threaded calls share a session; a CUDA session computes one batch at a time.
    num_sessions = 1 if name == "openvino" or (on_cpu and target.threads == 1) else target.streams
    sessions = []
    for _ in range(num_sessions):
        classify = open_classifier(
            bundle.model_path,
            target,
            batch_size=size,
            compile_cache=_compile_cache(bundle, target, size),
        )
        check_golden(
            bundle,
            partial(warm_up, classify),
            where=f"{name} ({classify.active.device})",
            precision=target.precision,
            rounding=_rounding(target),
            batch_size=size or bundle.meta.fixed_batch,
        )
        sessions.append(classify)
    return [sessions[number % num_sessions] for number in range(target.streams)]


def _options(provider: ProviderSpec) -> dict[str, str]:
    """The user's own, as ONNX Runtime takes them."""
    return {key: _as_text(value) for key, value in provider.options.items()}


def _rounding(target: Target) -> Precision:
    """The precision to expect of a session: TF32, where it is had and asked for, rounds as fp16."""
    if target.provider.name == "cuda" and target.precision == "fp32":
        from batchclf.runtime.cuda import asks_for_tf32, has_tf32
        from batchclf.runtime.cuda_machine import architecture_of

        if asks_for_tf32(target.options) and has_tf32(architecture_of(target.device_id)):
            return "fp16"
    return target.precision


def _compile_cache(bundle: Bundle, target: Target, size: int | None) -> Path:
    """Where a provider keeps what it compiled: the folder's name says all that it depends on."""
    key = (_what_answers(bundle, target), size)
    folder = cache_folder().parent / "compiled"
    if target.provider.name == "openvino":
        with suppress(OSError):  # a cache that can only be read
            private_folder(folder)  # what is compiled is loaded again as code is
    return folder / digest_of(key)[:24]


def _what_answers(bundle: Bundle, target: Target) -> tuple[object, ...]:
    """All that the answers of a session depend on, its device and the size of its batches apart."""
    return (
        bundle.digest,
        target.provider.name,
        sorted(installed_flavours().items()),
        target.device_type,
        target.precision,
        sorted(target.options.items()),
    )


def _check_precision(
    wanted: Wanted, reduced: Bundle, target: Target, classify: InParts, part: Part
) -> PrecisionCheck:
    """Compare with fp32 on the CPU, which every ONNX Runtime has and which is beyond doubt."""
    bundle = wanted.model.bundle

    def compare() -> PrecisionCheck:
        full = open_classifier(
            bundle.model_path, Target(require_provider("cpu"), threads=usable_cores())
        )
        return compare_precisions(
            classify,
            full,
            wanted.sample.pixels,
            part.num_images,
            activation=bundle.meta.activation,
        )

    key = (
        *(_what_answers(reduced, target), part.num_images, classify.active.device),
        *(bundle.digest, _cpu(), wanted.sample.digest),
    )
    check, _ = remembered("agreement", key, PrecisionCheck, compare)
    check = replace(check, speed=_speed(bundle, reduced, target, classify, part))
    precision = precision_name(wanted.job.precision, check)
    wanted.log(
        f"{precision} compared with fp32 on "
        f"{check.num_images} of the job's images: same top class on {check.top1_agreement:.1%}, "
        f"largest difference of a score {check.max_score_difference:.2f}"
    )
    if check.is_slow:
        wanted.log(
            f"{precision} is slower than fp32 here, {check.speed} times as fast on "
            f"{classify.active.device}: use precision fp32, which is exact as well"
        )
    require_agreement(check, wanted.job)
    return check


def _speed(
    bundle: Bundle, reduced: Bundle, target: Target, classify: InParts, part: Part
) -> float | None:
    """How many times as fast as fp32 the target is, in the same parts; on CPUs only.

    An accelerator is not measured: it has units for what it can be asked for.
    """
    if not _is_cpu(target):
        return None

    def measure() -> Speed:
        at_fp32 = replace(target, precision="fp32")
        size = None if target.provider.name == "cpu" else part.num_images
        full = open_classifier(
            bundle.model_path,
            at_fp32,
            batch_size=size,
            compile_cache=_compile_cache(bundle, at_fp32, size),
        )
        pixels_NHWC = tiled(sample_pixels(*bundle.meta.preprocess.crop), part.num_images)
        return measure_speed(classify, full, pixels_NHWC, by_cpu=target.threads == 1)

    key = (_what_answers(reduced, target), bundle.digest, part.num_images, _machine(target))
    found, _ = remembered("speed", key, Speed, measure)
    return found.times


def _host_memory(spec: ProviderSpec, log: Log) -> HostMemory:
    if not (gpus := gpus_of(spec)):
        return HostMemory()
    from batchclf.runtime.cuda import page_locked, pinned_pixels

    # The memory belongs to one GPU, and serves all of them.
    return HostMemory(
        partial(pinned_pixels, device=gpus[0], log=log),
        partial(page_locked, device=gpus[0], log=log),
    )
