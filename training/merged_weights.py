"""Base + adapter -> one model folder, for a task that keeps an engine busy by itself.

Over its base an adapter costs two more matrix products at each layer for each token; merged into the weights it costs
nothing, and no other adapter shares the engine. Merged weights round otherwise than base and adapter do, so a merged
specialist has a gate of its own, certified on its own engine.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import pathlib
import tempfile

from cluster.errors import TrainingError
from cluster.store import Store, content_hash

MERGED_FOLDER = "merged"


def publish_merged(store: Store, task_id: str, base: str, adapter: str, cache: pathlib.Path | None = None) -> str:
    """Merge an adapter into a copy of its base, once; returns the copy's store path, named by both contents.

    Args:
        base: store path, as `adapter`.
        cache: folder for what is fetched of an object store.

    Raises:
        TrainingError: the adapter does not fit the base, or holds numbers that are none.
    """
    contents = [store.manifest(path)["sha256"] for path in (base, adapter)]
    path = f"{MERGED_FOLDER}/{task_id}/{content_hash(contents)[:12]}"
    if not store.is_published(path):
        with tempfile.TemporaryDirectory() as local:
            merge(store.fetch(base, cache), store.fetch(adapter, cache), pathlib.Path(local))
            store.publish(path, pathlib.Path(local), {"task_id": task_id, "base": base, "adapter": adapter})
    return path


def merge(base: pathlib.Path, adapter: pathlib.Path, out: pathlib.Path) -> None:
    """Write the merged model and the base's tokenizer to a folder; needs memory for the weights in float32.

    Raises:
        TrainingError: as `publish_merged`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    kept_as = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype or torch.float32
    # Added in float32: in a shorter type the adapter's small numbers would be rounded away twice.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise TrainingError(f"merge {adapter.name}: {type(error).__name__}: {first_line[:300]}") from None
    merged.to(kept_as).save_pretrained(out)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(out)
