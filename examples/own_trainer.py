"""Quantization-aware training in a trainer of your own: prepare the model, train it as always, save, pack.

    python examples/own_trainer.py MODEL TEXT -o FOLDER [--steps N]

Here it is Hugging Face's own Trainer with its own loss (the next token of TEXT); any other trainer that takes a
Hugging Face model goes the same way. MODEL is anything lowbit opens; FOLDER gets the checkpoint and model-q4_0.gguf.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lowbit
import lowbit.train  # before torch: it sets how threads wait

import torch  # isort: skip
from transformers import Trainer, TrainingArguments  # isort: skip

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.train.data import load_sequences

RECIPE = "q4_0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("-o", "--out", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--steps", metavar="N", type=int, default=50)
    parser.add_argument("--length", metavar="N", type=int, default=256, help="tokens a sequence")
    args = parser.parse_args()
    try:
        run(args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def run(args: argparse.Namespace) -> None:
    with open_checkpoint(args.model) as checkpoint:
        model = lowbit.train.load(checkpoint)
        sequences = load_sequences(args.text, lowbit.train.load_tokenizer(checkpoint), args.length)

        # From here on every matrix of the recipe computes with the values it will have in the file.
        lowbit.train.prepare(model, RECIPE)
        # Q4_0 trains the matrices; an embedding on Q8_0 or Q6_K is left as it is.
        model.get_input_embeddings().requires_grad_(False)

        tokens = torch.from_numpy(sequences).long()
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(args.out / "trainer"),
                max_steps=args.steps,
                per_device_train_batch_size=2,
                learning_rate=1e-5,  # small: next tokens of a text pull harder than a reference's probabilities
                warmup_steps=4,
                save_strategy="no",
                report_to=[],
                logging_steps=max(1, args.steps // 10),
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        )
        trainer.train()
        saved = lowbit.train.save(model, args.out / "checkpoint", like=checkpoint)
    # The codes and scales that training ended on are copied, not rounded again.
    lowbit.pack(saved, RECIPE, args.out / f"model-{RECIPE}.gguf")
    print(args.out / f"model-{RECIPE}.gguf")


if __name__ == "__main__":
    sys.exit(main())
