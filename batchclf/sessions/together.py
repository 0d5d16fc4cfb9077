"""What several devices opened with, told as of one job."""

from collections.abc import Iterable, Sequence
from itertools import chain

from batchclf.results.records import ActiveProvider


def together(found: Sequence[tuple[str, ActiveProvider]]) -> ActiveProvider:
    """All that is to be told of what several devices, each with its name, opened with."""
    each = [one for _, one in found]
    if len(each) == 1:
        return each[0]
    fallbacks = dict.fromkeys(f"{name}: {one.fallback}" for name, one in found if one.fallback)
    return ActiveProvider(
        requested=_all_of(one.requested for one in each),
        active=_all_of(one.active for one in each),
        device=_all_of(one.device for one in each),
        nodes={
            provider: max(one.nodes.get(provider, 0) for one in each)
            for provider in _keys_of(one.nodes for one in each)
        },
        cpu_nodes=tuple(_keys_of(one.cpu_nodes for one in each)),
        options={
            name: _all_of(one.options[name] for one in each if name in one.options)
            for name in _keys_of(one.options for one in each)
        },
        fallback="; ".join(fallbacks) or None,
    )


def _all_of(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _keys_of(each: Iterable[Iterable[str]]) -> Iterable[str]:
    """Those of any, once each, in their order."""
    return dict.fromkeys(chain.from_iterable(each))
