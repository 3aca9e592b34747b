"""The rules for the metadata at the top of a README.md, as far as the Hub's documentation and its answers tell them."""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

HEADER = re.compile(r"^\s*---[ \t]*(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)
EMPTY = re.compile(r"^\s*---[ \t]*(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


LICENSES = words(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib
    """
)
TASKS = words(
    """
    any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition
    depth-estimation document-question-answering feature-extraction fill-mask graph-ml image-classification
    image-feature-extraction image-segmentation image-text-to-image image-text-to-text image-text-to-video
    image-to-3d image-to-image image-to-text image-to-video keypoint-detection mask-generation multiple-choice
    object-detection other question-answering reinforcement-learning robotics sentence-similarity summarization
    table-question-answering table-to-text tabular-classification tabular-regression tabular-to-text
    text-classification text-generation text-ranking text-retrieval text-to-3d text-to-audio text-to-image
    text-to-speech text-to-video time-series-forecasting token-classification translation
    unconditional-image-generation video-classification video-text-to-text video-to-video visual-document-retrieval
    visual-question-answering voice-activity-detection zero-shot-classification zero-shot-image-classification
    zero-shot-object-detection
    """
)
LANGUAGES = words(  # of two letters; those of three letters are too many to list
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss
    st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """
)
SPECIAL_LANGUAGES = ("code", "multilingual")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
SIZES = words(
    """
    n<1K 1K<n<10K 10K<n<100K 100K<n<1M 1M<n<10M 10M<n<100M 100M<n<1B 1B<n<10B 10B<n<100B 100B<n<1T n>1T
    """
)
ID = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, as the Hub's parser does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicated mapping key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep)


def parse(content: str) -> Any:
    """The metadata of a card; None if it has none."""
    match = HEADER.match(content)
    if match is None or EMPTY.match(content):
        return None
    return yaml.load(match.group(1), StrictLoader)


def metadata(content: str) -> dict[str, Any] | None:
    """The metadata of a card that can be read, which a committed one need not be."""
    try:
        value = parse(content)
    except yaml.YAMLError:
        return None
    return value if isinstance(value, dict) else None


def validate(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings on a card."""
    try:
        card = parse(content)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ['"value" must be of type object'], []
    rules = dataset_errors(card) if repo_type == "dataset" else model_errors(card)
    return [*common_errors(card), *rules], list(warnings(card))


def strings(card: dict[str, Any], key: str, *, single: bool = False) -> Iterator[str]:
    """Errors of what must be a list of strings, or if `single` may be one string."""
    value = card.get(key, [])
    if single and isinstance(value, str):
        return
    if not isinstance(value, list):
        yield f'"{key}" must be an array'
    else:
        yield from (f'"{key}[{i}]" must be a string' for i, item in enumerate(value) if not isinstance(item, str))


def named(card: dict[str, Any], key: str) -> list[tuple[str, str]]:
    """The strings of a key that has one or a list of them, each with what errors call it."""
    value = card.get(key)
    items = [(f"{key}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else [(key, value)]
    return [(name, item) for name, item in items if isinstance(item, str)]


def is_id(value: str) -> bool:
    """Whether a model or dataset could have this name."""
    return ID.fullmatch(value) is not None and "--" not in value and ".." not in value


def common_errors(card: dict[str, Any]) -> Iterator[str]:
    """Errors that cards of models and of datasets may have."""
    for key in ("language", "license"):
        yield from strings(card, key, single=True)
    yield from strings(card, "tags")
    for name, code in named(card, "license"):
        if code not in LICENSES:
            yield f'"{name}" must be one of [{", ".join(sorted(LICENSES))}]'
    for name, code in named(card, "language"):
        if code != code.lower():
            yield f'"{name}" must only contain lowercase characters'
        elif code not in LANGUAGES and code not in SPECIAL_LANGUAGES and not re.fullmatch("[a-z]{3}", code):
            yield f'"{name}" with value "{code}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code'
    for key in ("license_name", "license_link", "pretty_name", "library_name", "pipeline_tag", "thumbnail"):
        if not isinstance(card.get(key, ""), str):
            yield f'"{key}" must be a string'


def warnings(card: dict[str, Any]) -> Iterator[str]:
    """What the Hub accepts and yet remarks on."""
    for key, what in {"pipeline_tag": "pipeline tag", "task_categories": "task category"}.items():
        for _, task in named(card, key):
            if task not in TASKS:
                yield f'The {what} "{task}" is not in the official list: {", ".join(sorted(TASKS))}'
    if card.get("license") == "other" and "license_name" not in card:
        yield '"license" is "other": give it a "license_name"'


def model_errors(card: dict[str, Any]) -> Iterator[str]:
    """Errors of the card of a model."""
    for key in ("datasets", "base_model"):
        yield from strings(card, key, single=True)
    yield from strings(card, "metrics")
    if not isinstance(card.get("widget", []), list):
        yield '"widget" must be an array'
    for name, id in named(card, "datasets"):
        if not is_id(id):
            yield f'"{name}" with value "{id}" is not valid. If possible, use a dataset id from https://hf.co/datasets.'
    for name, id in named(card, "base_model"):
        if not is_id(id):
            yield f'"{name}" with value "{id}" is not valid. Use a model id from https://hf.co/models.'
    if card.get("base_model_relation", "merge") not in RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'
    if "model-index" in card:
        yield from index_errors(card["model-index"])


def required(owner: Any, name: str, *keys: str) -> Iterator[str]:
    """Errors of a mapping that needs strings under these keys."""
    if not isinstance(owner, dict):
        yield f'"{name}" is required' if owner is None else f'"{name}" must be of type object'
        return
    for key in keys:
        value = owner.get(key)
        if value is None:
            yield f'"{name}.{key}" is required'
        elif not isinstance(value, str):
            yield f'"{name}.{key}" must be a string'
        elif not value:
            yield f'"{name}.{key}" is not allowed to be empty'


def items(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Elements of a list, each with what errors call it."""
    if isinstance(value, list):
        yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))


def needs_list(owner: dict[str, Any], name: str, key: str) -> Iterator[str]:
    """Errors of a mapping that needs a list under a key."""
    if not isinstance(owner.get(key), list):
        yield f'"{name}.{key}" must be an array' if key in owner else f'"{name}.{key}" is required'


def index_errors(index: Any) -> Iterator[str]:
    """Errors of the results that the card of a model reports."""
    if not isinstance(index, list):
        yield '"model-index" must be an array'
    for name, model in items(index, "model-index"):
        yield from required(model, name, "name")
        if isinstance(model, dict):
            yield from needs_list(model, name, "results")
            for result_name, result in items(model.get("results"), f"{name}.results"):
                yield from result_errors(result, result_name)


def result_errors(result: Any, name: str) -> Iterator[str]:
    """Errors of results of one model on one dataset."""
    yield from required(result, name)
    if not isinstance(result, dict):
        return
    dataset = result.get("dataset")
    yield from required(result.get("task"), f"{name}.task", "type")
    yield from required(dataset, f"{name}.dataset", "name", "type")
    type = dataset.get("type") if isinstance(dataset, dict) else None
    if isinstance(type, str) and type and not ID.fullmatch(type):
        yield f'"{name}.dataset.type" with value "{type}" fails to match the required pattern: /{ID.pattern}/'
    yield from needs_list(result, name, "metrics")
    for metric_name, metric in items(result.get("metrics"), f"{name}.metrics"):
        yield from required(metric, metric_name, "type")
        if isinstance(metric, dict):
            yield from value_errors(metric.get("value"), f"{metric_name}.value")


def value_errors(value: Any, name: str) -> Iterator[str]:
    """Errors of a measured value: a number, or a text such as "0.5 +/- 0.1"."""
    if value is None:
        yield f'"{name}" is required'
    elif isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
        yield f'"{name}" must be a number'
    elif isinstance(value, float) and not math.isfinite(value):
        yield f'"{name}" must be a finite number'


def dataset_errors(card: dict[str, Any]) -> Iterator[str]:
    """Errors of the card of a dataset."""
    for key in ("task_categories", "task_ids", "size_categories"):
        yield from strings(card, key)
    for name, size in named(card, "size_categories"):
        if size not in SIZES:
            yield f'"{name}" must be one of [{", ".join(sorted(SIZES))}]'
    if not isinstance(card.get("dataset_info", {}), dict | list):
        yield '"dataset_info" must be of type object or array'
    if not isinstance(card.get("configs", []), list):
        yield '"configs" must be an array'
    for name, config in items(card.get("configs"), "configs"):
        yield from required(config, name, "config_name")
