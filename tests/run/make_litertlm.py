"""Makes tiny.litertlm, where litert-torch 0.10 is installed: ``python tests/run/make_litertlm.py OUT``.

litert-torch imports tensorflow for one file that ai_edge_litert has too; a stand-in is enough. It brings 2 GB, so the
29,000 weights that it makes are kept beside this file, and no test needs it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import conftest

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
CACHE = 96


def save_small(folder: Path) -> None:
    """The model behind the file, as a Hugging Face folder: the same on every call."""
    from transformers import LlamaConfig

    conftest.save_tiny(folder, LlamaConfig(**conftest.TINY_LLAMA | SMALL))


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stand_in = folder / "tensorflow" / "lite" / "python"
        stand_in.mkdir(parents=True)
        for package in (stand_in, *list(stand_in.parents)[:2]):
            (package / "__init__.py").touch()
        (stand_in / "schema_py_generated.py").write_text("from ai_edge_litert.schema_py_generated import *\n")
        sys.path.append(name)
        save_small(folder / "llama")
        from litert_torch.generative.export_hf.export import export

        export(
            str(folder / "llama"), name, prefill_lengths=[8], cache_length=CACHE, quantization_recipe="",
            keep_temporary_files=False,
        )  # fmt: skip
        out.write_bytes((folder / "model.litertlm").read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
