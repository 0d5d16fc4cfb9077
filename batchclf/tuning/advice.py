"""What limits the best settings, in the figures measured, and what would lift it."""

from collections.abc import Iterable, Mapping

from batchclf.tuning.records import DecodeLimit, Result, Verdict
from batchclf.tuning.search import Limits

LEAST_S, IDLE = 0.5, 0.3
"""Seconds of the first pass, and the share of them spent waiting, before the disk is named."""


def judge(best: Result, limits: Limits) -> Verdict:
    """Name the bottleneck of the best settings."""
    if best.bottleneck == "write":
        why = "writing the records took most of the time"
        return Verdict("write", why, ["an output folder on a faster disk"])
    decode, infer = limits.of(best.settings)
    rates = best.predicted.decode_limit_images_per_s, best.predicted.infer_limit_images_per_s
    if limits.on_cpu and best.predicted.limit_images_per_s < min(rates):
        return _of_cores(best, limits, decode.cpu_ms_per_image, infer.cpu_ms_per_image or 0.0)
    return _of_one(best, limits)


def _of_cores(best: Result, limits: Limits, decode_ms: float, infer_ms: float) -> Verdict:
    share = infer_ms / (infer_ms + decode_ms)
    bottleneck = "infer" if share >= 0.5 else "decode"
    why = (
        f"the cores are shared: an image takes {decode_ms:.2f} ms of CPU time to decode "
        f"({1 - share:.0%}) and {infer_ms:.2f} ms to infer ({share:.0%}), so they could do "
        f"{best.predicted.limit_images_per_s:,.1f} images/s; {_reached(best)}"
    )
    return Verdict(bottleneck, why, ["more cores", *_lift(bottleneck, best, limits)])


def _of_one(best: Result, limits: Limits) -> Verdict:
    decode = best.predicted.decode_limit_images_per_s
    infer = best.predicted.infer_limit_images_per_s
    workers = best.settings.workers
    if decode < infer:
        why = (
            f"decoding with workers {workers} gives {decode:,.1f} images/s, inference {infer:,.1f}"
        )
        more = "more or faster cores"
    else:
        why = (
            f"inference gives {infer:,.1f} images/s, decoding with workers {workers} {decode:,.1f}"
        )
        more = "a faster device"
    bottleneck = "decode" if decode < infer else "infer"
    lift = [more, *_lift(bottleneck, best, limits)]
    return Verdict(bottleneck, f"{why}, each alone; {_reached(best)}", lift)


def _reached(best: Result) -> str:
    return f"reached together: {best.images_per_s:,.1f} ({best.efficiency:.0%})"


def _lift(bottleneck: str, best: Result, limits: Limits) -> list[str]:
    """What would make decoding or inference cheaper, with its gain where that was measured."""
    mode, precision = best.settings.decode, best.settings.session.precision
    if bottleneck == "decode":
        rates = _best_rates((one.decode, one.images_per_s) for one in limits.decode.values())
        others = [f"decode: {text}" for text in _gains(rates, mode)]
        if mode == "exact" and not others:
            others = ["decode: fast (not measured: --decodes fast)"]
        return [*others, "smaller images, such as JPEGs near the model's input size"]
    rates = _best_rates(
        (one.session.precision, one.images_per_s)
        for one in limits.infer.values()
        if one.images_per_s is not None
    )
    others = [f"precision {text}" for text in _gains(rates, precision)]
    if precision == "fp32" and not others:
        others = ["a lower precision (not measured: --precisions with what the provider runs)"]
    return [*others, "a smaller model"]


def _best_rates(measured: Iterable[tuple[str, float]]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for name, rate in measured:
        rates[name] = max(rate, rates.get(name, 0.0))
    return rates


def _gains(rates: Mapping[str, float], own: str) -> list[str]:
    return [
        f"{name} (x {rate / rates[own]:.2f} measured alone)"
        for name, rate in rates.items()
        if name != own
    ]


def disk_note(first: DecodeLimit, later: DecodeLimit, num_cores: int) -> str | None:
    """A warning where reading, not decoding, held up the first pass over the sample."""
    wall_s = first.num_images / first.images_per_s
    busy = first.images_per_s * first.cpu_ms_per_image / 1000 / min(first.workers, num_cores)
    is_slower = first.images_per_s < 0.7 * later.images_per_s
    if wall_s < LEAST_S or not is_slower or busy > 1 - IDLE:
        return None
    return (
        f"the first pass over the sample gave only {first.images_per_s:,.1f} images/s, later ones "
        f"{later.images_per_s:,.1f} from the page cache: a run reads each image once, so the disk "
        "is its limit; a faster disk lifts it, more loader.workers hide some of it"
    )
