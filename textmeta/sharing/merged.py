"""An encoder of its own: LoRA merged into its weights, in the format of transformers and sentence-transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from torch import Tensor

from textmeta.encoder.lora import LORA_B
from textmeta.encoder.pretrained import load_pretrained
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError
from textmeta.files import destination


def write_merged(folder: str | Path, reader: TokenStateReader, factors: Mapping[str, Tensor]) -> None:
    """Write the encoder with LoRA merged into it, W + (alpha / rank) · B A in place of W, as a sentence encoder.

    A text's vector is the mean over the tokens of its last layer, or the first of them, where the encoder was made so.
    AdapterError if the folder holds anything or cannot be written, or the encoder's files have changed by now.

    Source: Hu et al. (2021), "LoRA", section 4.1.
    """
    folder, encoder = destination(folder), reader.encoder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"cannot write a merged encoder to {folder}: it is there already, and is not empty")
    model, tokenizer, _, weights_sha256, _ = load_pretrained(*encoder.source, encoder.access)
    if weights_sha256 != encoder.weights_sha256:
        raise AdapterError(f"the weights of {encoder.source[0]} are no longer those that were loaded before")
    scale = encoder.lora.alpha / encoder.lora.rank
    for name, lora_a in factors.items():
        if ".lora_A." in name:
            weight = model.get_parameter(name.replace(".lora_A.", "."))
            lora_b = factors[name.replace(".lora_A.", LORA_B)]
            weight.data += scale * (lora_b.detach().cpu() @ lora_a.detach().cpu())
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    files = {  # which tell sentence-transformers how a text becomes a vector
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{module}"}
            for number, (path, module) in enumerate(modules.items())
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": encoder.hidden_size,
            "pooling_mode_cls_token": encoder.first_token,
            "pooling_mode_mean_tokens": not encoder.first_token,
        },
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": encoder.settings.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".textmeta-") as beside:
            new = Path(beside) / folder.name
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            for name, content in files.items():
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            new.rename(folder)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot write a merged encoder to {folder}: {error}") from error
