"""The reference cache that ``lowbit measure --reference-cache`` reads."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from fuzzing.mutate import Choices, mutate_bytes, mutate_json
from lowbit import compact
from lowbit.measure import sketch
from lowbit.measure.reference_cache import ReferenceCache

if TYPE_CHECKING:
    from fuzzing.readers import Place


def reference_cache(place: Place, choices: Choices) -> None:
    """A reference cache, opened and measured from; often with a checksum that is right again."""
    good = place.good["reference.cache"]
    end = 12 + int.from_bytes(good[8:12], "little")
    if choices.below(3):
        header, body = good[12:end], good[end:-32]
        header, body = (
            (mutate_json(header, choices), body) if choices.below(2) else (header, mutate_bytes(body, choices))
        )
        whole = good[:8] + len(header).to_bytes(4, "little") + header + body
        path = place.put("reference.cache", whole + hashlib.sha256(whole).digest())
    else:
        path = place.put("reference.cache", mutate_bytes(good, choices))
    with ReferenceCache(path) as cache:
        for chunk in range(min(cache.header.chunks, 4)):
            records = cache.records(chunk)
            ids, _ = compact.unpack(cache.layout, records)
            found = sketch.parts(cache.layout, records, np.full(ids.shape, -3.0), np.full(len(ids), -9.0)).settled()
            assert np.isfinite(found.estimate).all() and (found.low <= found.high).all()
