"""What decides the outcome of a run: only a run with the same fingerprint can go on from a checkpoint."""

import json
from dataclasses import asdict
from typing import Any

from textmeta.data.episodes import EpisodeSampler
from textmeta.model.encoder import Encoder

__all__ = ["run_fingerprint"]


def run_fingerprint(
    encoder: Encoder,
    train_episodes: EpisodeSampler,
    valid_episodes: EpisodeSampler,
    **settings: Any,
) -> dict[str, Any]:
    """Return, as JSON would give it back, everything that decides what a run ends in.

    Args:
        encoder: its weights, whatever they are called, pooling, length, LoRA and precision count.
        train_episodes: corpora, settings and seed count.
        valid_episodes: likewise.
        **settings: dataclasses, by name, that count but for what trades memory for time.
    """
    encoder_settings = {key: getattr(encoder.settings, key) for key in ("pooling", "max_length")}
    parts = {name: asdict(part) for name, part in settings.items()}
    for name in ("checkpointed", "texts_at_once"):  # memory's affair: they can change when a run goes on
        parts.get("training", {}).get("meta_gradient", {}).pop(name, None)
    content = {
        "encoder": {**encoder_settings, "weights_sha256": encoder.weights_sha256, "precision": encoder.precision},
        "lora": asdict(encoder.lora),
        **parts,
        **{
            part: {
                "episodes": asdict(sampler.settings),
                "seed": sampler.seed,
                "corpora": [corpus.summary for corpus in sampler.corpora],
            }
            for part, sampler in (("train", train_episodes), ("valid", valid_episodes))
        },
    }
    return json.loads(json.dumps(content))  # type: ignore[no-any-return]
