"""AutoRound on a Hugging Face folder, to a Q4_0 GGUF. Run by cheaper.py with the Python of an environment of its own:

    PYTHON _rival_autoround.py MODEL_FOLDER SEQUENCES.npy OUT_FOLDER ITERS SAMPLES

Prints one line of JSON: the CPU seconds behind it, loading included and imports not. One thread.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound


def main(folder: str, sequences: str, out: str, iters: int, samples: int) -> None:
    torch.set_num_threads(1)
    begin = time.process_time()
    rows = torch.from_numpy(np.load(sequences)[:samples].astype(np.int64))
    data: list[Any] = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    rounding = AutoRound(
        folder,
        scheme="gguf:q4_0",
        dataset=data,
        iters=iters,
        nsamples=len(data),
        seqlen=rows.shape[1],
        batch_size=min(8, len(data)),
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(out, format="gguf:q4_0")
    print(json.dumps({"seconds": time.process_time() - begin, "detail": f"{iters} iterations, {len(data)} samples"}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))  # type: ignore[call-arg, arg-type]
