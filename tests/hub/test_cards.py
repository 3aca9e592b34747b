"""The rules for cards, as huggingface_hub asks the local Hub about them."""

import re

import pytest
import yaml
from huggingface_hub import DatasetCard, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import BadRequestError

from tests.hub import cards
from tests.hub.server import TOKEN, HubServer

GOOD_MODEL = """
license: apache-2.0
language: [en, deu, multilingual]
library_name: textmeta
pipeline_tag: text-classification
tags: [few-shot]
datasets: [banking77, org/data]
metrics: [accuracy]
base_model: org/base-v1.0
base_model_relation: adapter
widget: [{text: Hello}]
anything: else
model-index:
- name: model
  results:
  - task: {type: text-classification}
    dataset: {name: Banking 77, type: banking77}
    metrics: [{type: accuracy, value: 0.5}, {type: accuracy, value: 0.5 +/- 0.1}]
"""
GOOD_DATASET = """
license: [mit, cc0-1.0]
language: en
pretty_name: Some data
size_categories: [n<1K]
task_categories: [text-classification]
task_ids: [intent-classification]
configs: [{config_name: default, data_files: data/*.parquet}]
dataset_info: {features: [{name: text, dtype: string}]}
"""
RESULT = "model-index[0].results[0]"


def card(header: str) -> str:
    return f"---\n{header.strip()}\n---\n# Title\n"


def index(**result: object) -> str:
    """The header of a card with one result, in which some parts are replaced; None leaves one out."""
    whole = {
        "task": {"type": "t"},
        "dataset": {"name": "n", "type": "d"},
        "metrics": [{"type": "m", "value": 1}],
    } | result
    kept = {key: value for key, value in whole.items() if value is not None}
    return yaml.safe_dump({"model-index": [{"name": "model", "results": [kept]}]})


def test_good_cards(hub: HubServer) -> None:
    ModelCard(card(GOOD_MODEL)).validate()
    DatasetCard(card(GOOD_DATASET)).validate()
    assert cards.validate(card(GOOD_MODEL), "model") == ([], [])
    assert cards.validate(card(GOOD_DATASET), "dataset") == ([], [])


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ("- a\n- b", '"value" must be of type object'),
        ("a: [", "Invalid YAML"),
        ("license: mit\nlicense: mit", "Invalid YAML: duplicated mapping key 'license'"),
        ("license: Apache", '"license" must be one of [afl-3.0, '),
        ("license: [mit, gpl-4]", '"license[1]" must be one of'),
        ("license: 3", '"license" must be an array'),
        ("license: other\nlicense_name: 3", '"license_name" must be a string'),
        ("language: EN", '"language" must only contain lowercase characters'),
        ("language: [en, english]", '"language[1]" with value "english" is not valid'),
        ("language: xx", '"language" with value "xx" is not valid'),
        ("language: no", '"language" must be an array'),  # YAML reads this as false
        ("library_name: [a]", '"library_name" must be a string'),
        ("pipeline_tag: {a: b}", '"pipeline_tag" must be a string'),
        ("tags: a", '"tags" must be an array'),
        ("tags:", '"tags" must be an array'),
        ("tags: [a, 3]", '"tags[1]" must be a string'),
        ("metrics: accuracy", '"metrics" must be an array'),
        ("widget: Hello", '"widget" must be an array'),
        ("datasets: {a: b}", '"datasets" must be an array'),
        ("datasets: [Some data]", '"datasets[0]" with value "Some data" is not valid'),
        ("datasets: a/b/c", '"datasets" with value "a/b/c" is not valid'),
        ("base_model: /home/me/model", '"base_model" with value "/home/me/model" is not valid'),
        ("base_model: [a/b, a--b]", '"base_model[1]" with value "a--b" is not valid'),
        ("base_model: ../b", '"base_model" with value "../b" is not valid'),
        ("base_model: 3", '"base_model" must be an array'),
        ("base_model_relation: child", '"base_model_relation" must be one of [adapter, finetune, merge, quantized]'),
        ("model-index: a", '"model-index" must be an array'),
        ("model-index: [{results: []}]", '"model-index[0].name" is required'),
        ("model-index: [{name: a}]", '"model-index[0].results" is required'),
        ("model-index: [{name: a, results: b}]", '"model-index[0].results" must be an array'),
        ("model-index: [{name: a, results: [b]}]", '"model-index[0].results[0]" must be of type object'),
        (index(task=None), f'"{RESULT}.task" is required'),
        (index(task={"name": "t"}), f'"{RESULT}.task.type" is required'),
        (index(dataset=None), f'"{RESULT}.dataset" is required'),
        (index(dataset={"type": "d"}), f'"{RESULT}.dataset.name" is required'),
        (index(dataset={"name": "", "type": "d"}), f'"{RESULT}.dataset.name" is not allowed to be empty'),
        (index(dataset={"name": "n"}), f'"{RESULT}.dataset.type" is required'),
        (index(dataset={"name": "n", "type": "a b"}), f'"{RESULT}.dataset.type" with value "a b" fails to match'),
        (index(metrics=None), f'"{RESULT}.metrics" is required'),
        (index(metrics={"type": "m"}), f'"{RESULT}.metrics" must be an array'),
        (index(metrics=[3]), f'"{RESULT}.metrics[0]" must be of type object'),
        (index(metrics=[{"value": 1}]), f'"{RESULT}.metrics[0].type" is required'),
        (index(metrics=[{"type": 1, "value": 1}]), f'"{RESULT}.metrics[0].type" must be a string'),
        (index(metrics=[{"type": "m"}]), f'"{RESULT}.metrics[0].value" is required'),
        (index(metrics=[{"type": "m", "value": True}]), f'"{RESULT}.metrics[0].value" must be a number'),
        (index(metrics=[{"type": "m", "value": float("nan")}]), f'"{RESULT}.metrics[0].value" must be a finite number'),
    ],
)
def test_errors_of_models(hub: HubServer, header: str, error: str) -> None:
    with pytest.raises(ValueError, match=rf"^Invalid metadata in README.md.\n- {re.escape(error)}"):
        HfApi()._validate_yaml(card(header), repo_type="model")


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ("license: Apache", '"license" must be one of'),
        ("size_categories: [tiny]", '"size_categories[0]" must be one of'),
        ("task_categories: text-classification", '"task_categories" must be an array'),
        ("task_ids: [3]", '"task_ids[0]" must be a string'),
        ("pretty_name: 3", '"pretty_name" must be a string'),
        ("configs: {}", '"configs" must be an array'),
        ("configs: [{data_files: a}]", '"configs[0].config_name" is required'),
        ("dataset_info: a", '"dataset_info" must be of type object or array'),
    ],
)
def test_errors_of_datasets(hub: HubServer, header: str, error: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(error)):
        DatasetCard(card(header), ignore_metadata_errors=True).validate()


@pytest.mark.parametrize(
    ("content", "repo_type", "warning"),
    [
        ("# Title\n", "model", "empty or missing yaml metadata in repo card"),
        ("---\n---\n# Title\n", "model", "empty or missing yaml metadata in repo card"),
        ("# Title\n---\nlicense: nonsense\n---\n", "model", "empty or missing yaml metadata in repo card"),
        (card("pipeline_tag: guessing"), "model", 'The pipeline tag "guessing" is not in the official list'),
        (card("task_categories: [guessing]"), "dataset", 'The task category "guessing" is not in the official list'),
        (card("license: other"), "model", 'give it a "license_name"'),
    ],
)
def test_warnings(hub: HubServer, content: str, repo_type: str, warning: str) -> None:
    with pytest.warns(UserWarning, match=warning):
        HfApi()._validate_yaml(content, repo_type=repo_type)


def test_cards_that_the_client_writes(hub: HubServer) -> None:
    result = EvalResult(
        "text-classification", "banking77", "Banking 77", "accuracy", 0.5, dataset_args={"split": "test"}
    )
    data = ModelCardData(model_name="model", license="mit", language="en", base_model="a/b", eval_results=[result])
    ModelCard.from_template(data).validate()


def test_wrong_cards_are_not_committed(hub: HubServer) -> None:
    api = HfApi(token=TOKEN)
    api.create_repo("tester/model")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=card("license: no").encode(), path_in_repo="README.md", repo_id="tester/model")
    api._validate_yaml = lambda *args, **keywords: None  # type: ignore[method-assign]
    with pytest.raises(BadRequestError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=card("license: no").encode(), path_in_repo="README.md", repo_id="tester/model")
    assert set(hub.files("tester/model")) == {".gitattributes"}
    hub.add_repo("tester/broken", {"README.md": card("a: [").encode()})  # there may be such from long ago
    assert api.model_info("tester/broken").card_data is None
