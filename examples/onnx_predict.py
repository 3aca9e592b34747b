"""Predicts by a folder that ``export_onnx`` wrote, with onnxruntime, tokenizers and numpy alone.

    python examples/onnx_predict.py FOLDER 'someone took my wallet' 'how much is left?'
    python examples/onnx_predict.py FOLDER --reject 0.5 < texts.txt

Prints one JSON object a text: the text, the label (null where it is rejected), and the label's probability.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Classifier:
    """A classifier that was exported."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.meta = json.loads((folder / "onnx.json").read_text(encoding="utf-8"))
        # infinity has no other way into JSON
        self.labels = [float(label["float"]) if isinstance(label, dict) else label for label in self.meta["labels"]]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # which cuts texts at the right length
        self.tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        self.inputs = {given.name for given in self.session.get_inputs()}

    def run(self, texts: list[str], batch: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities (n, classes), and scope (n,): how surely a text belongs to any class, NaN if unknown."""
        found = self.tokenizer.encode_batch([self.meta["prompt"] + text for text in texts])
        whole = self.meta["encoder"]["long_texts"] == "window"
        windows = [[one.ids, *(more.ids for more in one.overflowing if whole)] for one in found]
        # alike in length, so that there is little padding
        order = sorted(range(len(texts)), key=lambda text: sum(map(len, windows[text])))
        probabilities, scope = np.zeros((len(texts), len(self.labels))), np.full(len(texts), np.nan)
        for start in range(0, len(order), batch):
            own = order[start : start + batch]
            rows = [(place, ids) for place, text in enumerate(own) for ids in windows[text]]
            ids = np.zeros((len(rows), max(len(ids) for _, ids in rows)), np.int64)
            mask = np.zeros_like(ids)
            for row, (_, given) in enumerate(rows):
                ids[row, : len(given)], mask[row, : len(given)] = given, 1
            feed = {"input_ids": ids, "attention_mask": mask, "text": np.array([place for place, _ in rows])}
            logits, *more = self.session.run(None, {name: feed[name] for name in self.inputs})
            powers = np.exp(logits.astype(float) - logits.max(1, keepdims=True))
            probabilities[own] = powers / powers.sum(1, keepdims=True)
            if more:
                scope[own] = more[0]
        return probabilities, scope

    def predict(self, texts: list[str], reject: float = 0.0) -> list[tuple[Any, float]]:
        """Return the label and probability of each text; None for one whose scope is below a number."""
        probabilities, scope = self.run(texts)
        best = probabilities.argmax(1)
        rows = zip(best.tolist(), probabilities.max(1).tolist(), (scope < reject).tolist(), strict=True)
        return [(None if is_out else self.labels[label], probability) for label, probability, is_out in rows]


def main() -> None:
    """Print what is predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", nargs="*", help="by default the lines of standard input")
    parser.add_argument("--reject", type=float, default=0.0, help="texts whose scope is below this number, 0 to 1")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    texts = given.texts or sys.stdin.read().splitlines()
    answers = Classifier(given.folder, given.threads).predict(texts, given.reject)
    for text, (label, probability) in zip(texts, answers, strict=True):
        print(json.dumps({"text": text, "predicted": label, "probability": probability}, ensure_ascii=False))


if __name__ == "__main__":
    main()
