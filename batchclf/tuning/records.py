"""What tuning measures and finds; each record is one line of tune.jsonl.

Rates are images per second, wall time; `cpu_ms_per_image` is CPU time, user and system, of all
threads, and of decoding processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from batchclf.results.records import DecodeMode, Precision


@dataclass(frozen=True, slots=True)
class Session:
    """What inference is opened with: all that decides how fast it is without decoding."""

    precision: Precision
    batch_size: int
    streams: int
    """Per device."""
    threads: int
    part: int
    """Images inferred at once; but on a CPU, the whole batch."""

    @property
    def alone(self) -> "Session":
        """The same for batches of one part: what the speed of inference by itself depends on."""
        return replace(self, batch_size=self.part)


@dataclass(frozen=True, slots=True)
class Settings:
    """One combination to try: a session, and how it is fed."""

    session: Session
    decode: DecodeMode
    workers: int


@dataclass(frozen=True, slots=True)
class DecodeLimit:
    """How fast images are read and decoded when nothing else runs."""

    kind: ClassVar[str] = "decode"
    decode: DecodeMode
    workers: int
    is_first_pass: bool
    """Whether files may have come from the disk; all later passes read the page cache."""
    num_images: int
    num_errors: int
    images_per_s: float
    cpu_ms_per_image: float


@dataclass(frozen=True, slots=True)
class InferLimit:
    """How fast sessions answer when nothing else runs; one that does not fit has no figures."""

    kind: ClassVar[str] = "infer"
    session: Session
    too_large: bool
    images_per_s: float | None = None
    cpu_ms_per_image: float | None = None
    open_s: float | None = None
    """Seconds of opening the sessions and checking their answers."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What decoding and inference, each measured alone, let a combination reach."""

    settings: Settings
    decode_limit_images_per_s: float
    infer_limit_images_per_s: float
    limit_images_per_s: float


@dataclass(frozen=True, slots=True)
class Trial:
    """The whole pipeline at one combination, in its steady state; too large: no figures."""

    kind: ClassVar[str] = "trial"
    predicted: Prediction
    too_large: bool
    num_images: int = 0
    """Of the steady state, as `wall_s`; beginning and end are left out."""
    wall_s: float = 0.0
    images_per_s: float = 0.0
    efficiency: float = 0.0
    """Share of the predicted limit that was reached."""
    cpu_ms_per_image: float = 0.0
    batch_ms: Mapping[str, float] | None = None
    """Inference of one batch: p50 and p95."""
    bottleneck: str = ""
    """decode, infer or write, told as in stats.jsonl."""

    @property
    def settings(self) -> Settings:
        return self.predicted.settings


@dataclass(frozen=True, slots=True)
class Result:
    """All trials of one combination together: medians over `num_trials`."""

    predicted: Prediction
    num_trials: int
    images_per_s: float
    efficiency: float
    cpu_ms_per_image: float
    batch_ms: Mapping[str, float]
    bottleneck: str

    @property
    def settings(self) -> Settings:
        return self.predicted.settings


@dataclass(frozen=True, slots=True)
class Verdict:
    """What limits the best settings, and what would lift that."""

    bottleneck: str
    """decode, infer or write."""
    why: str
    lift: Sequence[str]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `batchclf tune` found."""

    model: str
    provider: str
    device: str
    num_cores: int
    on_cpu: bool
    """Whether inference takes the cores that decoding wants."""
    num_listed: int
    num_sampled: int
    current: Settings
    """What the job says now."""
    results: Sequence[Result]
    """The fastest first."""
    too_large: Mapping[Precision, int]
    """Batch sizes from which on the memory does not suffice."""
    best: Result
    verdict: Verdict
    keys: Mapping[str, int | str]
    """The best settings as dotted keys of the job file."""
    notes: Sequence[str]
    """What was left out, and why; what was found beside the figures."""
    wall_s: float

    @property
    def current_result(self) -> Result | None:
        """Figures of the job's settings as they are; None: they were not measured."""
        return next((one for one in self.results if one.settings == self.current), None)


def as_line(record: DecodeLimit | InferLimit | Trial) -> dict[str, Any]:
    """A record as one flat line of tune.jsonl."""
    return {"type": record.kind, **as_facts(record)}


def as_facts(record: DecodeLimit | InferLimit | Trial | Result | Settings) -> dict[str, Any]:
    """A record's fields with those of the prediction, settings and session in it at one level."""
    return _flat(asdict(record))


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if key in ("predicted", "settings", "session"):
            found |= _flat(value)
        else:
            found[key] = round(value, 4) if isinstance(value, float) else value
    return found
