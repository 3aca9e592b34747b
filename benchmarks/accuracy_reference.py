"""What the accuracy benchmark is compared with: the frozen baseline as it was before, and published figures."""

from collections.abc import Iterable, Mapping

from accuracy_scores import Series
from measure import print_table

__all__ = ["print_references"]

# 1-shot and 5-shot, 5-way, mean of 5 folds: frozen MiniLM as measured before, and others as quoted second-hand
FROZEN = {"banking77": (86.8, 95.9), "hwu64": (81.3, 92.6), "liu": (82.9, 93.5), "clinc150": (94.7, 98.8)}
PUBLISHED = {
    "ProtAugment (unigram)": ("89.6 / 94.7", "84.3 / 92.6", "86.1 / 93.7", "96.5 / 98.7"),
    "ContrastNet": ("91.2 / 96.4", "86.6 / 92.6", "85.9 / 93.7", "96.6 / 98.5"),
    "LAQDA (label names, transductive)": ("89.2 / 94.8", "85.2 / 91.8", "88.0 / 93.5", "97.0 / 98.6"),
}
TOLERANCE = 0.3

Rows = Mapping[tuple[str, int], Mapping[str, Mapping[str | None, Series]]]


def print_references(rows: Rows, titles: Mapping[str, str], ours: Iterable[str]) -> None:
    """Compare frozen prototypes with what they were before, and set published figures beside.

    Args:
        rows: corpus and shots → method → fold → scores.
        titles: of the methods.
        ours: methods that stand beside the published ones.
    """
    print()
    for corpus, expected in FROZEN.items():
        for shots, value in zip((1, 5), expected, strict=True):
            folds = rows.get((corpus, shots), {}).get("frozen", {})
            if len(folds) == 5 and all(len(part.accuracy) >= 600 for part in folds.values()):
                found = 100 * Series.joined(folds.values()).accuracy.mean()
                verdict = "as it should be" if abs(found - value) <= TOLERANCE else "WRONG BASELINE"
                print(f"* Frozen prototypes, {corpus}, {shots} shots: {found:.2f}, before {value}: {verdict}")
    table = [("1-shot / 5-shot, mean of 5 folds, BERT-base, quoted second-hand", *FROZEN)]
    table += [(name, *figures) for name, figures in PUBLISHED.items()]
    for method in ("frozen", *ours):
        cells = []
        for corpus in FROZEN:
            pair = [rows.get((corpus, shots), {}).get(method) for shots in (1, 5)]
            means = [
                f"{100 * Series.joined(f.values()).accuracy.mean():.1f}" if f and len(f) == 5 else "–" for f in pair
            ]
            cells.append(" / ".join(means))
        table.append((f"*measured here, MiniLM: {titles[method]}*", *cells))
    print("\nPublished figures, of other episodes and an encoder five times as large: approximate\n")
    print_table(table)
