"""How fast textmeta is beside what people use otherwise: to fit, to predict, one text, a cold start; memory and size.

And what of a fit is learning, what a batch of tasks takes beside one by one, and second order beside first.

    python benchmarks/speed.py --data-dir DATA --quick     # in five minutes on 2 cores
    python benchmarks/speed.py --data-dir DATA             # the tables, in 25 minutes

All sides have the same encoder, all-MiniLM-L6-v2, the same texts, threads and process, and take turns; figures are
medians, ratios are to sentence-transformers' encode of the same texts. Memory and a cold start are of a new process.
Fine-tuning is PEFT's LoRA by its defaults, 20 epochs of batches of 8; it and SetFit have one turn, and none for larger
sizes after one of more than --limit seconds.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from baselines import encoder_folder
from cells import choose_corpora
from choose import SHIPPED
from contestants import KnownStates
from measure import Options, alternate, markdown
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from textmeta import FewShotClassifier
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.store import load_adapter

Predict = Callable[[list[str]], object]
Fit = Callable[[list[str], list[str]], Predict]

SIZES = ((2, 2), (5, 5), (5, 10), (20, 10), (77, 10), (150, 10))  # classes x examples
TEXTS, LONG_WORDS, CALLS = 128, 180, 50  # of a column; words of a long text; of one text each
ENCODE, DEFAULT, LONG = "sentence-transformers, encode", "textmeta", ("PEFT LoRA, fine-tuned", "SetFit")
COLD = {  # what a new process runs before it has its first answer; names in braces are folders
    ENCODE: "from sentence_transformers import SentenceTransformer; SentenceTransformer({encoder!r}).encode(['a'])",
    DEFAULT: "from textmeta import FewShotClassifier; FewShotClassifier.from_pretrained({fitted!r}).predict(['a'])",
    "textmeta, ONNX": "from textmeta import FewShotClassifier; "
    "FewShotClassifier.from_pretrained({onnx!r}, backend='onnx').predict(['a'])",
    "import textmeta": "import textmeta",
    "import sentence_transformers": "import sentence_transformers",
    "pass": "pass",
}


# The sides: each fits, and returns what predicts

tokenizer_of = cache(AutoTokenizer.from_pretrained)


@cache
def sentence_encoder(device: str):
    """Return the encoder as sentence-transformers has it."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    return SentenceTransformer(encoder_folder(), device=device)


def onnx_fit(int8: bool, texts: list[str], labels: list[str]) -> Predict:
    """Fit, export the classifier, and return what predicts by ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder:
        FewShotClassifier(device="cpu").fit(texts, labels).export_onnx(Path(folder) / "m", int8=int8)
        return FewShotClassifier.from_pretrained(Path(folder) / "m", backend="onnx").predict


def logistic_fit(device: str, texts: list[str], labels: list[str]) -> Predict:
    """Fit logistic regression to sentence embeddings."""
    head = LogisticRegression(max_iter=1000).fit(sentence_encoder(device).encode(texts), labels)
    return lambda queries: head.predict(sentence_encoder(device).encode(queries))


def setfit_fit(device: str, texts: list[str], labels: list[str]) -> Predict:
    """Fit SetFit."""
    from setfit_rival import setfit_model  # noqa: PLC0415 - an extra

    return setfit_model(texts, np.unique(labels, return_inverse=True)[1], 256, device).predict


def peft_fit(device: str, texts: list[str], labels: list[str]) -> Predict:
    """Fine-tune the encoder with PEFT's LoRA."""
    tokenizer = tokenizer_of(encoder_folder())
    numbers = torch.tensor(np.unique(labels, return_inverse=True)[1], device=device)
    base = AutoModelForSequenceClassification.from_pretrained(encoder_folder(), num_labels=int(numbers.max()) + 1)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS")).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

    def logits(rows: list[str]) -> torch.Tensor:
        batch = tokenizer(rows, padding=True, truncation=True, max_length=256, return_tensors="pt").to(device)
        return model(**batch).logits

    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(len(texts))
        for start in range(0, len(texts), 8):
            rows = order[start : start + 8]
            loss = torch.nn.functional.cross_entropy(logits([texts[row] for row in rows]), numbers[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    @torch.inference_mode()
    def predict(queries: list[str]) -> object:
        return [logits(queries[start : start + 32]).argmax(-1) for start in range(0, len(queries), 32)]

    return predict


def sides(device: str) -> dict[str, Fit]:
    """Return the sides by name."""
    fast, exact = (FewShotClassifier(precision=how, device=device, progress=False) for how in ("auto", "no"))
    made: dict[str, Fit] = {  # the first two keep their encoder
        DEFAULT: lambda texts, labels: fast.fit(texts, labels).predict,
        "textmeta, float32": lambda texts, labels: exact.fit(texts, labels).predict,
        ENCODE: lambda texts, _: (sentence_encoder(device).encode(texts), sentence_encoder(device).encode)[1],
        "sentence-transformers, logistic regression": partial(logistic_fit, device),
        "textmeta, ONNX": partial(onnx_fit, False),
        "textmeta, ONNX, int8": partial(onnx_fit, True),
        LONG[0]: partial(peft_fit, device),
        LONG[1]: partial(setfit_fit, device),
    }
    return {name: side for name, side in made.items() if device == "cpu" or "ONNX" not in name}


# What is measured


def examples(data_dir: Path, ways: int, shots: int) -> tuple[list[str], list[str]]:
    """Return labelled texts of banking77, or of clinc150 for more classes than it has."""
    corpus = _corpus(data_dir, "banking77" if ways <= 77 else "clinc150")
    rows = [row for label in range(ways) for row in corpus.rows_of(label)[:shots]]
    return [corpus.texts[row] for row in rows], [corpus.class_names[corpus.labels[row]] for row in rows]


@cache
def _corpus(data_dir: Path, name: str) -> Corpus:
    return load_corpus(CorpusSettings(str(data_dir / f"{name}.jsonl")))


@cache
def columns(data_dir: Path, count: int) -> dict[str, list[str]]:
    """Return short, long and mixed texts, the last two of the choose corpora alike, shuffled."""
    rng, corpora = np.random.default_rng(0), choose_corpora(data_dir)
    mixed = [corpus.texts[row] for corpus in corpora for row in rng.permutation(len(corpus.texts))[:count]]
    long = [text for text in mixed if len(text.split()) >= LONG_WORDS]
    found = {"short": _corpus(data_dir, "banking77").texts, "long": long, "mixed": mixed}
    return {name: [str(text) for text in rng.permutation(texts)[:count]] for name, texts in found.items()}


def fit_rows(
    data_dir: Path, fits: dict[str, Fit], sizes: Sequence[tuple[int, int]], repeats: int, limit: float
) -> Iterator[list[str]]:
    """Yield the table of what a fit takes: seconds, and how often that is what encode takes."""
    yield ["fit, s (times encode)", *(f"{ways} x {shots}" for ways, shots in sizes)]
    cells: dict[str, list[str]] = {name: [] for name in fits if "ONNX" not in name}
    slow: set[str] = set()
    for ways, shots in sizes:
        texts, labels = examples(data_dir, ways, shots)
        runs = {name: partial(fits[name], texts, labels) for name in cells if name not in slow}
        once = {name: runs.pop(name) for name in LONG if name in runs}  # too long for turns
        times = {name: median(values) for name, values in alternate(runs, repeats, f"{ways} x {shots}").items()}
        for name, run in once.items():
            start = time.perf_counter()
            run()
            times[name] = time.perf_counter() - start
        slow |= {name for name in once if times[name] > limit}
        for name, row in cells.items():
            told = times.get(name)
            row.append("–" if told is None else f"{told:.2f} ({told / times[ENCODE]:.2f})")
    yield from ([name, *row] for name, row in cells.items())


def predict_rows(data_dir: Path, fits: dict[str, Fit], texts: int, repeats: int) -> Iterator[list[str]]:
    """Yield the table of texts a second, and the latency of one text."""
    given = columns(data_dir, texts)
    predicts = {name: fit(*examples(data_dir, 5, 5)) for name, fit in fits.items()}
    found: dict[str, list[str]] = {name: [] for name in predicts}
    for title, own in given.items():
        times = alternate({name: partial(predict, own) for name, predict in predicts.items()}, repeats, title)
        rates = {name: len(own) / median(values) for name, values in times.items()}
        for name, rate in rates.items():
            found[name].append(f"{rate:.0f} ({rate / rates[ENCODE]:.2f})")
    ones = {name: partial(predict, given["short"][:1]) for name, predict in predicts.items()}
    # each with encode alone: threads of ONNX Runtime that wait for work would slow down the next side
    pairs = {name: {name: one, ENCODE: ones[ENCODE]} for name, one in ones.items()}
    times = {name: alternate(pair, CALLS, "one text")[name] for name, pair in pairs.items()}
    yield ["texts a second (times encode)", *given, "one text, ms: p50", "p95"]
    for name, row in found.items():
        quantiles = np.quantile(times[name], (0.5, 0.95)) * 1000
        yield [name, *row, *(f"{value:.1f}" for value in quantiles)]


def cold_rows(data_dir: Path, repeats: int) -> Iterator[list[str]]:
    """Yield the table of what a new process takes, beyond one that does nothing, and of sizes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"fitted": f"{folder}/fitted", "onnx": f"{folder}/onnx", "encoder": encoder_folder()}
        classifier = FewShotClassifier(device="cpu").fit(*examples(data_dir, 5, 5))
        classifier.save_pretrained(places["fitted"])
        classifier.export_onnx(places["onnx"])
        commands = {name: [sys.executable, "-c", code.format(**places)] for name, code in COLD.items()}
        runs = {name: partial(subprocess.run, command, check=True) for name, command in commands.items()}
        times = {name: median(values) for name, values in alternate(runs, repeats, "cold").items()}
        bare = times.pop("pass")
        yield ["a new process, s", "median", "times encode's"]
        for name, seconds in times.items():
            yield [name, f"{seconds - bare:.2f}", f"{(seconds - bare) / (times[ENCODE] - bare):.2f}"]
        for title, place in places.items():
            size = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
            yield [f"the folder: {title}", f"{size / 2**20:.1f} MiB", ""]


def memory_rows(arguments: argparse.Namespace, names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the table of the peak memory of a new process that fits and predicts."""
    yield ["peak memory of a process, MiB", "5 x 5", "77 x 10"]
    for name in names:
        row = []
        for size in ("5x5", "77x10"):
            if size == "77x10" and name in LONG:
                row.append("–")  # too long
                continue
            of = ["--memory-of", name, size, "--device", arguments.device]
            command = [sys.executable, __file__, "--data-dir", str(arguments.data_dir), *of]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row.append(f"{int(done.stdout.split()[-1]) / 1024:.0f}")
        yield [name, *row]


def share_rows(data_dir: Path, texts: int, repeats: int) -> Iterator[list[str]]:
    """Yield where the time of predicting mixed texts goes, and the share of the machine's matrix-product peak."""
    mixed = columns(data_dir, texts)["mixed"]
    classifier = FewShotClassifier(precision="no", device="cpu", progress=False).fit(*examples(data_dir, 5, 5))
    reader, factors = classifier._learner.reader, classifier._adapter.initialisation.lora
    square = torch.rand(2048, 2048)
    runs = {
        "all of predict": lambda: classifier.predict(mixed),
        "tokens": lambda: reader.encoder.tokenize(mixed),
        "tokens and token states": torch.inference_mode()(lambda: reader.read(mixed, factors)),
        "a product of 2048 x 2048 matrices": lambda: square @ square,
    }
    times = {name: median(values) for name, values in alternate(runs, repeats, "shares").items()}
    peak = 2 * 2048**3 / times.pop("a product of 2048 x 2048 matrices")
    weights = sum(m.weight.numel() for m in reader.encoder._suffix.modules() if hasattr(m, "names"))
    tokens = sum(len(ids) for own in reader.encoder.tokenize(mixed) for ids in own)
    flops = 2 * tokens * 2 * weights  # LoRA is on all maps of the upper half, which is as large as the lower
    whole = times["all of predict"]
    yield ["predict of mixed texts, float32", "share of its time"]
    yield ["tokens", f"{times['tokens'] / whole:.2f}"]
    yield ["forward", f"{(times['tokens and token states'] - times['tokens']) / whole:.2f}"]
    yield ["views, head", f"{1 - times['tokens and token states'] / whole:.2f}"]
    yield ["linear maps at the measured matrix-product peak", f"{flops / peak / whole:.2f}"]


def learning_rows(data_dir: Path, repeats: int) -> Iterator[list[str]]:
    """Yield what learning takes beside encode, 16 tasks as one batch beside one by one, second order beside first.

    Token states are given; texts are banking77's, the gradients of two 5-way 5-shot tasks.
    """
    adapter, _ = load_adapter(SHIPPED)
    reader, init = adapter.load_reader(), adapter.initialisation
    leaves = {name: value.clone().requires_grad_() for name, value in init.tensors().items()}
    whole = TaskLearner(reader, replace(adapter, initialisation=init.with_tensors(leaves)))

    def episodes(ways: int, shots: int, count: int) -> list[Episode]:
        return EpisodeSampler(_corpus(data_dir, "banking77"), EpisodeSettings(ways, shots, 5), seed=0).take(count)

    def learn(tasks: list[Episode]) -> Callable[[], object]:
        batch, known = TaskBatch.of_episodes(tasks), KnownStates(reader, init.lora)
        known.know(batch.support.texts)
        states = known.read(batch.support.texts)
        known.read = lambda *_: states
        return torch.no_grad()(lambda: TaskLearner(known, adapter).learn(batch))

    many, two = episodes(5, 5, 16), episodes(5, 5, 2)
    single = [learn([task]) for task in many]
    maml, fomaml = (partial(ALGORITHMS[name].gradient, whole, two, leaves) for name in ("maml", "fomaml"))
    pairs = [("16 tasks as one batch", learn(many), "one by one", lambda: [run() for run in single])]
    pairs += [("meta-gradient of second order", maml, "of first order", fomaml)]
    for ways, shots in ((5, 5), (77, 10)):
        tasks = episodes(ways, shots, 1)
        encode = partial(sentence_encoder("cpu").encode, list(tasks[0].support_texts))
        pairs.append((f"learn {ways} x {shots}", learn(tasks), "encode", encode))
    yield ["what", "median s", "beside", "median s", "ratio"]
    for title, run, other, beside in pairs:
        times = alternate({title: run, other: beside}, repeats, title)
        own, rival = median(times[title]), median(times[other])
        yield [title, f"{own:.3f}", other, f"{rival:.3f}", f"{own / rival:.2f}"]


def main() -> None:
    """Print the tables."""
    parser = Options(__doc__, threads=2)
    parser.add_argument("--quick", action="store_true", help="few repeats; SetFit at 2 x 2 alone, no fine-tuning")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=40, help="seconds")
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "SIZE"), help="print the peak of one side, in KiB")
    arguments = parser.parsed()
    if arguments.memory_of:
        name, size = arguments.memory_of
        texts, labels = examples(arguments.data_dir, *map(int, size.split("x")))
        sides(arguments.device)[name](texts, labels)(texts)
        print(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
        return
    data_dir, quick = arguments.data_dir, arguments.quick
    fits = sides(arguments.device)
    sizes, repeats, count = (SIZES[:5:2], 3, 96) if quick else (SIZES, 5, TEXTS)
    if quick:
        fits.pop(LONG[0])
    short = {name: fit for name, fit in fits.items() if name not in LONG}
    print(markdown(fit_rows(data_dir, fits, sizes, repeats, 0 if quick else arguments.limit)))
    print(markdown(predict_rows(data_dir, short if quick else fits, count, repeats)))
    print(markdown(share_rows(data_dir, count, repeats)))
    if arguments.device == "cpu":
        print(markdown(learning_rows(data_dir, repeats)))
        print(markdown(cold_rows(data_dir, 1 if quick else repeats)))
    if not quick:
        print(markdown(memory_rows(arguments, list(fits))))


if __name__ == "__main__":
    main()
