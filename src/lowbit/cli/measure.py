"""Fidelity, speed, memory and tasks of packed artifacts, each in its runtime, against a reference: on a held-out text
(--text), on sets of questions (--tasks), or both; or the harness of `lowbit serve` on them (--harness)."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from lowbit.cli import harness_measurement, long_measurements, output
from lowbit.cli.training import positive, whole

if TYPE_CHECKING:
    from lowbit.measure.tasks import TaskOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "artifacts", metavar="ARTIFACT", nargs="*", help="GGUF files, MLX or Hugging Face folders, URLs"
    )
    parser.add_argument("--against", metavar="REFERENCE", help="a GGUF of high precision or a MODEL")
    parser.add_argument(
        "--reference-cache",
        metavar="FILE",
        help="keep there what the reference says of the text, 300 bytes a token; once it is made it is used instead of "
        "running the reference, and --against may be left out",
    )
    parser.add_argument(
        "--cache-error",
        type=float,
        default=0.001,
        metavar="NATS",
        help="say so where the cache may add more than this to the mean KLD (default: 0.001)",
    )
    parser.add_argument(
        "--runtime",
        metavar="NAME",
        help="run the artifacts in llama.cpp, llama-server, mlx, transformers, litert-lm or openai (default: what each "
        "is for)",
    )
    parser.add_argument(
        "--reference-runtime",
        metavar="NAME",
        help="run the reference there (default: what a file is for; a MODEL in the first artifact's)",
    )
    parser.add_argument("--model", metavar="NAME", help="of a URL: the model's name there (default: the only one)")
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="of a URL: where its API key is (OPENAI_API_KEY)")
    parser.add_argument(
        "--top-logprobs", type=positive, default=100, metavar="K", help="of a URL: most likely tokens (default: 100)"
    )
    parser.add_argument("--text", metavar="FILE", help="held-out text, UTF-8")
    parser.add_argument("--chunk", type=positive, default=512, metavar="N", help="tokens a chunk (default: 512)")
    parser.add_argument("--chunks", type=positive, metavar="N", help="how many chunks (default: the whole text)")
    parser.add_argument(
        "--kv-type",
        default="f16",
        metavar="TYPE",
        help="KV cache of the artifacts: f16 (default), q8_0, ...",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all it may use)")
    parser.add_argument("--no-speed", action="store_true", help="leave out speed and memory")
    _add_task_arguments(parser)
    long_measurements.add_arguments(parser)
    harness_measurement.add_arguments(parser)
    output.add_json(parser)


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks",
        metavar="TASK,...",
        help="sets of questions: facts, json-schema, tool-calls (see docs/tasks.md), names of lm-eval's tasks, files "
        "(.jsonl, or lm-eval's .yaml)",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="questions of each set (default: all)")
    group.add_argument("--shots", "--num-fewshot", type=whole, metavar="N", help="worked examples before each question")
    group.add_argument("--max-tokens", type=positive, metavar="N", help="of a generated answer (default: the set's)")
    group.add_argument(
        "--apply-chat-template", action="store_true", help="put the questions through the model's chat template"
    )
    group.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="lm-eval's task files may run the Python that they name (!function)",
    )


def _task_options(args: argparse.Namespace) -> TaskOptions | None:
    from lowbit.measure.tasks import TaskOptions

    if args.tasks is None:
        return None
    return TaskOptions(
        tasks=[name.strip() for name in args.tasks.split(",")],
        limit=args.limit,
        shots=args.shots,
        max_tokens=args.max_tokens,
        chat=args.apply_chat_template,
        allow_code=args.confirm_run_unsafe_code,
    )


def run(args: argparse.Namespace) -> int:
    if harness_measurement.wanted(args):
        return harness_measurement.run(args)
    from lowbit.measure import MeasureOptions, measure

    costs = not args.no_speed
    options = MeasureOptions(
        chunk=args.chunk,
        chunks=args.chunks,
        kv_type=args.kv_type,
        threads=args.threads,
        runtime=args.runtime,
        reference_runtime=args.reference_runtime,
        model=args.model,
        api_key_env=args.api_key_env,
        top_logprobs=args.top_logprobs,
        speed=costs,
        memory=costs,
        cache_error=args.cache_error,
        **long_measurements.options(args),
    )
    file = None if args.json == "-" else args.json
    with output.results_only():
        measured = measure(
            args.artifacts,
            against=args.against,
            text=args.text,
            reference_cache=args.reference_cache,
            tasks=_task_options(args),
            json=file,
            options=options,
        )
    if args.json == "-":
        output.write_result(measured, args.json)
    if args.json != "-":
        from lowbit.report import terminal  # type: ignore[attr-defined]

        terminal.show_measurement(measured, sys.stdout)
    return 0
