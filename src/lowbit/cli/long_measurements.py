"""The options of `lowbit measure` for what takes minutes: KV caches, facts in long texts, speed at depths."""

from __future__ import annotations

import argparse
from typing import Any

from lowbit.cli.training import positive
from lowbit.errors import BadOption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "KV caches and long contexts", "each takes minutes; with --json FILE a killed run goes on from FILE.work"
    )
    group.add_argument("--kv", type=_words, metavar="TYPES", help="measure these KV caches: f16,q8_0,q8_0:q4_0 (K:V)")
    group.add_argument(
        "--contexts", type=_numbers, metavar="N,...", help="at these lengths, of --retrieval too (default: 512,2048)"
    )
    group.add_argument("--kv-tokens", type=positive, metavar="N", help="tokens of text at each length (default: 8192)")
    group.add_argument(
        "--kv-limit", type=float, metavar="NATS", help="what a recommended KV cache may change (default: 0.02)"
    )
    group.add_argument("--retrieval", action="store_true", help="look for facts in long texts, with each KV cache")
    group.add_argument(
        "--depths", type=_numbers, metavar="PERCENT,...", help="where the facts are (default: 0,25,50,75,100)"
    )
    group.add_argument("--haystacks", type=positive, metavar="N", help="texts at each length (default: 8)")
    group.add_argument(
        "--speed-depths", type=_numbers, metavar="N,...", help="time prompts and generation behind so many tokens"
    )
    group.add_argument("--slots", type=_numbers, metavar="N,...", help="and with so many slots at a time (default: 1)")
    group.add_argument("--kv-unified", action="store_true", help="one KV cache for all slots, instead of one each")
    group.add_argument("--repeats", type=positive, metavar="N", help="fresh processes that time each (default: 3)")
    group.add_argument("--minutes", type=float, metavar="N", help="budget for all of these (default: none)")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Those fields of MeasureOptions that the arguments say. Raises BadOption."""
    from lowbit.measure import KvOptions, RetrievalOptions, SpeedOptions

    timed = bool(args.speed_depths or args.slots)
    if (args.contexts and not (args.kv or args.retrieval)) or (
        args.minutes is not None and not (args.kv or args.retrieval or timed)
    ):
        raise BadOption("nothing takes these lengths or minutes", hint="Add --kv TYPES or --retrieval")
    kv = {"types": args.kv, "contexts": args.contexts, "tokens": args.kv_tokens, "limit": args.kv_limit}
    depths = None if args.depths is None else tuple(depth / 100 for depth in args.depths)
    probes = {"lengths": args.contexts, "depths": depths, "haystacks": args.haystacks}
    timing = {"depths": args.speed_depths, "slots": args.slots, "repeats": args.repeats, "kv_unified": args.kv_unified}
    return {
        "kv": KvOptions(**_given(kv)) if args.kv else None,
        "retrieval": RetrievalOptions(**_given(probes)) if args.retrieval else None,
        "speed_at": SpeedOptions(**_given(timing)) if timed else None,
        "minutes": args.minutes,
    }


def _words(value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


def _numbers(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not whole numbers with commas between them: {value!r}") from None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}
