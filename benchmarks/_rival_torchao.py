"""torchao's int4 quantization-aware training of a Hugging Face folder, to such a folder. Run by cheaper.py with the
Python of an environment of its own:

    PYTHON _rival_torchao.py MODEL_FOLDER SEQUENCES.npy OUT_FOLDER SECONDS

Every linear layer but the head gets torchao's symmetric int4 fake quantizer in groups of 32, and is trained for SECONDS
of CPU time, loading included, as lowbit trains: the same sequences, targets (the unquantized model's probabilities),
steps of two sequences, AdamW at 1e-4 with 8 steps of warm-up and a cosine. Prints one line of JSON. One thread.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

_POSITIONS = 64
_BATCH, _WARM_UP, _RATE, _LOWEST = 2, 8, 1e-4, 0.01


def backward(hidden: torch.Tensor, targets: torch.Tensor, head: torch.Tensor) -> float:
    """Adds the gradient of the mean KL(reference || student); both (n, width), their final hidden states."""
    slope, total = torch.empty_like(hidden), 0.0
    with torch.no_grad():
        for start in range(0, len(hidden), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            log_q = F.log_softmax((hidden[part].bfloat16() @ head.T).float(), -1)
            log_p = F.log_softmax((targets[part].bfloat16() @ head.T).float(), -1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            slope[part] = ((log_q.exp() - log_p.exp()).bfloat16() @ head).float() / len(hidden)
    hidden.backward(slope)
    return total / len(hidden)


def main(folder: str, sequences: str, out: str, seconds: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begin = time.process_time()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher = copy.deepcopy(model).eval()
    head = teacher.get_output_embeddings().weight.detach().bfloat16()
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)

    def is_body(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    quantize_(model, QATConfig(weight_config=weights, step="prepare"), is_body)
    model.get_input_embeddings().weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rows = torch.from_numpy(np.load(sequences).astype(np.int64))
    step, loss, draw = 0, 0.0, np.random.default_rng(0)
    order = draw.permutation(len(rows))
    while (spent := time.process_time() - begin) < seconds:
        fraction = spent / seconds
        rate = min(1.0, (step + 1) / _WARM_UP) * (_LOWEST + (1 - _LOWEST) * 0.5 * (1 + math.cos(math.pi * fraction)))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * rate
        if len(order) < _BATCH:
            order = draw.permutation(len(rows))
        batch, order = rows[order[:_BATCH]], order[_BATCH:]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                targets = teacher.model(batch, use_cache=False).last_hidden_state
            hidden = model.model(batch, use_cache=False).last_hidden_state
        loss = backward(hidden.flatten(0, 1).float(), targets.flatten(0, 1).float(), head)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        print(f"torchao: step {step}, loss {loss:.4f}, {spent:.0f} of {seconds:.0f} s", file=sys.stderr, flush=True)
    spent = time.process_time() - begin
    quantize_(model, QATConfig(step="convert"))
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    print(json.dumps({"seconds": spent, "detail": f"{step} steps, loss {loss:.4f}"}))


if __name__ == "__main__":
    main(*sys.argv[1:4], float(sys.argv[4]))  # type: ignore[call-arg, arg-type]
