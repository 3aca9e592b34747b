"""Exporting a task with its encoder: a graph from token ids to token states, and one from these to logits, as one."""

import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.compose import add_prefix
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from torch import Tensor, nn

from textmeta.data.labels import label_to_json
from textmeta.encoder.attention import attention_by, plain_attention
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.lora import using_factors
from textmeta.encoder.token_states import StateBatch, TokenStateReader, TokenStates
from textmeta.errors import AdapterError, EncoderError
from textmeta.export.classifier import FORMAT, GRAPH, SPECIAL, TOKENIZER, open_session, text_batches
from textmeta.files import destination
from textmeta.meta.adapter import PROBES, Adapter, as_encoder_errors
from textmeta.meta.learner import LearnedTask, TaskLearner
from textmeta.sharing.folder import MAX_BYTES, ONNX, check_destination, write_folder
from textmeta.sharing.store import Fitted, write_json

LIBRARIES = ("textmeta", "torch", "transformers", "onnx", "onnxruntime")
WITHOUT_LORA = {"lora": "none", "pooling+lora": "pooling"}  # what steps adapt where LoRA is folded in
OPSET = 20  # the first that has Gelu
HIDDEN = -3e4  # what is added to the score of padding, whose exponential is 0
USUAL, FAR = 0.99, 0.5  # share of channels that stay as they are; one below this part of its size is far larger
CLOSE = 1e-3  # how far states of the graph may be from PyTorch's, beside their root mean square
ROWS, TEXTS = {0: "rows", 1: "length"}, {0: "texts"}
AXES = {"input_ids": ROWS, "attention_mask": ROWS, "text": {0: "rows"}, "states": {0: "rows", 2: "length"}}

Learn = Callable[[TaskLearner], LearnedTask]


def write_onnx(folder: str | Path, fitted: Fitted, learner: TaskLearner, learn_by: Learn | None = None) -> None:
    """Write a fitted task with its encoder as one graph, in place of what was in the folder.

    The learner is that of the task, in float32; ``learn_by``, for a graph of int8 numbers, learns the task anew by
    another. AdapterError if the folder cannot be replaced, or the graph is too large; EncoderError if the encoder
    cannot be exported.
    """
    check_destination(folder := destination(folder), {GRAPH})
    reader: Any = learner.reader
    adapter, task, encoder = learner.adapter, fitted.task, reader.encoder
    if not encoder.tokenizer.is_fast:
        raise EncoderError(f"the tokenizer of {encoder.settings.model} is Python alone: it cannot be exported")
    factors = {name: value[0].to(encoder.device) for name, value in task.factors.items()}
    states = states_graph(reader, factors or adapter.initialisation.lora)
    if learn_by:
        states, own = quantized(states, encoder), adapter.learner
        own = replace(own, adapt=WITHOUT_LORA.get(own.adapt, own.adapt))  # type: ignore[arg-type]
        by_graph: Any = GraphReader(states, encoder)
        task = learn_by(TaskLearner(by_graph, replace(adapter, learner=own)))
    graph = _task_graph(states, adapter, task, encoder.settings.long_texts == "window").SerializeToString()
    if len(graph) > MAX_BYTES:
        raise AdapterError(f"the graph has {len(graph)} bytes, expected at most {MAX_BYTES}")
    meta = {
        "format_version": FORMAT,
        "versions": {name: version(name) for name in LIBRARIES},
        "labels": [label_to_json(label) for label in fitted.classes],
        "encoder": asdict(encoder.settings),
        "prompt": encoder.prompt,
        "special_tokens": {name: own for name in SPECIAL if (own := getattr(encoder.tokenizer, name)) is not None},
        "int8": learn_by is not None,
    }
    tokenizer = encoder.tokenizer.backend_tokenizer.to_str().encode()
    write_folder(folder, {GRAPH: graph, TOKENIZER: tokenizer, ONNX: write_json(meta)})


def states_graph(reader: TokenStateReader, factors: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Return the graph from ``input_ids`` and ``attention_mask`` (rows, length) to ``states`` (rows, V, length, d).

    LoRA's factors (out, in) are folded into the weights. EncoderError if the encoder cannot be exported, or the graph
    makes other states than PyTorch.
    """
    encoder, module, random = reader.encoder, _States(reader), torch.Generator().manual_seed(0)
    most = encoder.settings.max_length

    def rows(length: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(len(encoder.tokenizer), (3, length), generator=random)
        mask = torch.arange(length) < torch.tensor([length, length // 2 + 1, length - 1])[:, None]
        return ids.to(encoder.device), mask.long().to(encoder.device)

    with as_encoder_errors(encoder.settings.model), torch.no_grad(), using_factors(factors):
        module(*rows(most))  # which folds LoRA in
        # traced with the longest texts: attention that looks no farther than a window shows in their masks
        graph = _exported(module, rows(most), ["input_ids", "attention_mask"], ["states"])
        session = open_session(graph.SerializeToString())
        for ids, mask in map(rows, {3, most // 2 + 1, most}):
            expected, given = module(ids, mask).cpu(), {"input_ids": ids, "attention_mask": mask}
            found = session.run(None, {name: value.cpu().numpy() for name, value in given.items()})[0]
            if not (torch.from_numpy(found) - expected).abs().max() <= CLOSE * expected.square().mean().sqrt():
                raise EncoderError(f"{encoder.settings.model} as ONNX makes other states: it cannot be exported")
    return graph


def quantized(graph: onnx.ModelProto, encoder: Encoder) -> onnx.ModelProto:
    """Return a graph of states whose products with weights are of int8 numbers; the one that is given is used up.

    Weights, by column, have 7 bits, because processors without VNNI add up products in 16; inputs have one scale.
    """

    def run(names: list[str]) -> list[list[np.ndarray]]:
        graph.graph.output.extend(map(helper.make_empty_tensor_value_info, names))
        session = open_session(graph.SerializeToString())
        del graph.graph.output[1:]
        batches = (next(text_batches(encoder.tokenize([text]))) for text in PROBES)  # one by one: without padding
        return [session.run(names, {"input_ids": ids, "attention_mask": mask}) for _, ids, mask, _ in batches]

    _level(graph.graph, run)
    add_pre_process_metadata(graph)  # else that is recommended in the log
    how = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    options = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
    with TemporaryDirectory() as folder:
        quantize_dynamic(graph, path := Path(folder) / GRAPH, ["MatMul"], **how, extra_options=options)
        return onnx.load(path)


def _level(graph: onnx.GraphProto, run: Callable[[list[str]], list[list[np.ndarray]]]) -> None:
    """Scale down those few channels of a product's input that are far larger than all others, and up their weights.

    They would leave the others few of 256 steps. In place; the graph has one output, and ``run`` gives of some texts
    what it makes under these names.

    Source: Xiao et al. (2023), "SmoothQuant", section 4.
    """
    weights = {own.name: own for own in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    products, before = defaultdict(list), {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and uses[node.input[1]] == 1:
            products[node.input[0]].append(node)
    for (name, own), *inputs in zip(products.items(), *run(list(products)), strict=True):
        most = np.max([abs(one).max((0, 1)) for one in inputs], 0)
        factor = np.minimum(1, np.quantile(most, USUAL) / np.maximum(most, 1e-9)).astype(np.float32)
        if factor.min() < FAR:
            graph.initializer.append(numpy_helper.from_array(factor, f"{name}/factor"))
            before[own[0].name] = helper.make_node("Mul", [name, f"{name}/factor"], [f"{name}/scaled"])
            for node in own:
                node.input[0], weight = f"{name}/scaled", weights[node.input[1]]
                scaled = numpy_helper.to_array(weight) / factor[:, None]
                weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
    nodes = [part for node in graph.node for part in (before.get(node.name), node) if part]
    del graph.node[:]
    graph.node.extend(nodes)


def _task_graph(states: onnx.ModelProto, adapter: Adapter, task: LearnedTask, windows: bool) -> onnx.ModelProto:
    """Return the graph of token states and what follows: to ``logits`` (texts, C), and ``scope`` (texts,) by a rule.

    Where texts are read in windows, a third input, ``text`` (rows,) int64, says which text a row is of.
    """
    device = adapter.initialisation.queries.device
    views, size = adapter.initialisation.queries.shape
    given = [torch.randn(3, views, 5, size), torch.ones(3, 5, dtype=torch.long), torch.arange(3)][: 2 + windows]
    inputs = ["states", "attention_mask", "text"][: 2 + windows]
    outputs = ["logits", "scope"][: 1 + (adapter.scope is not None)]
    with torch.no_grad():
        head = _exported(_Head(adapter, task.to(device)), tuple(own.to(device) for own in given), inputs, outputs)
    head = add_prefix(head, "task/", rename_inputs=False, rename_outputs=False)
    joined = onnx.ModelProto()
    joined.CopyFrom(states)
    del joined.graph.output[:]
    joined.graph.input.extend(value for value in head.graph.input if value.name == "text")
    for name in ("node", "initializer", "output"):
        getattr(joined.graph, name).extend(getattr(head.graph, name))
    return joined


class GraphReader:
    """Reads token states by a graph of them, in which LoRA is folded."""

    def __init__(self, graph: onnx.ModelProto, encoder: Encoder) -> None:
        self.session, self.encoder = open_session(graph.SerializeToString()), encoder

    def entering(self, texts: Sequence[str]) -> list[Any]:
        """Return nothing: no step changes what is folded in."""
        return []

    def read(self, texts: Sequence[str], factors: Any = None, row_task: Any = None, entered: Any = None) -> TokenStates:
        """Return the token states of texts, whatever the factors."""
        device, batches = self.encoder.device, []
        for numbers, ids, mask, place in text_batches(self.encoder.tokenize(texts)):
            found = self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
            parts = torch.tensor(numbers)[place], torch.from_numpy(found), torch.from_numpy(mask).bool()
            batches.append(StateBatch(*(part.to(device) for part in parts)))
        return TokenStates(len(texts), tuple(batches))


class _States(nn.Module):
    """The states (rows, V, length, d) of a reader, from ids and mask (rows, length)."""

    def __init__(self, reader: TokenStateReader) -> None:
        super().__init__()
        self.reader = reader  # whose halves are no part of this module: the exporter would set them to training

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        encoder = self.reader.encoder
        lower = () if encoder.frozen_layers is None else encoder.states(ids, mask, adapted=False)
        upper = encoder.states(lower[-1] if lower else ids, mask, adapted=True)
        states = [(*lower[:-1], *upper)[layer] for layer in self.reader.layers]
        if encoder.first_token:
            states[-1] = states[-1][:, :1].expand_as(states[-1])
        return torch.stack(states, 1) * mask[:, None, :, None]


class _Head(nn.Module):
    """What a task makes of token states (rows, V, length, d): logits (texts, C), and the scope (texts,) by a rule."""

    def __init__(self, adapter: Adapter, task: LearnedTask) -> None:
        super().__init__()
        self.adapter, self.task = adapter, replace(task, factors={})

    def forward(self, states: Tensor, mask: Tensor, text: Tensor | None = None) -> tuple[Tensor, ...]:
        text = torch.arange(states.shape[0], device=states.device) if text is None else text
        count: Any = text.max() + 1
        read = TokenStates(count, (StateBatch(text, states, mask.bool()),))
        reader: Any = SimpleNamespace(read=lambda *_: read)
        found = TaskLearner(reader, self.adapter).answer_all(self.task, ())
        return tuple(part[0] for part in (found.logits, found.scope) if part is not None)


def _exported(module: nn.Module, given: tuple[Tensor, ...], inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """Return the graph of a module, with its constants among the weights, where they are quantized, too."""
    exporter: Any = torch.onnx
    names = {"input_names": inputs, "output_names": outputs}
    file, axes = io.BytesIO(), {name: AXES.get(name, TEXTS) for name in inputs + outputs}
    with warnings.catch_warnings(), attention_by(_exported_attention):
        warnings.simplefilter("ignore")  # what a trace gets wrong shows in the comparison
        exporter.register_custom_op_symbolic("aten::index_add", _index_add, OPSET)
        try:  # the newer exporter takes ten times as long, and makes no other graph
            exporter.export(module, given, file, dynamic_axes=axes, opset_version=OPSET, dynamo=False, **names)
        finally:
            exporter.unregister_custom_op_symbolic("aten::index_add", OPSET)
    made = onnx.load_from_string(file.getvalue())
    graph, nodes = made.graph, list(made.graph.node)
    del graph.node[:], graph.value_info[:]
    for node in nodes:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            graph.initializer.append(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
        else:
            graph.node.append(node)
    return made


def _index_add(g: Any, sums: Any, _: Any, rows: Any, values: Any, *__: Any) -> Any:
    """Add values to rows of sums; PyTorch's own graph of it does so but once for each row."""
    places = g.op("Unsqueeze", rows, g.op("Constant", value_t=torch.tensor([-1])))
    return g.op("ScatterND", sums, places, values, reduction_s="add")


class _Attention(torch.autograd.Function):
    """Attention without a mask, (rows, length, heads, size), as one operation of ONNX Runtime."""

    @staticmethod
    def forward(_: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, heads: int) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).contiguous()

    @staticmethod
    def symbolic(g: Any, query: Any, key: Any, value: Any, scaling: float, heads: int) -> Any:
        joined, apart = (g.op("Constant", value_t=torch.tensor(shape)) for shape in ([0, 0, -1], [0, 0, heads, -1]))
        parts = (g.op("Reshape", part, joined) for part in (query, key, value))
        made = g.op("com.microsoft::MultiHeadAttention", *parts, num_heads_i=heads, scale_f=scaling)
        return g.op("Reshape", made, apart)


def _exported_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Attention whose mask is one more entry of queries and keys: the runtime's fastest kernel takes no mask."""
    of_keys = mask is not None and mask.dtype == torch.bool and bool((mask == mask[:, :1, :1]).all())
    if mask is None or not of_keys or query.shape[1] != key.shape[1] or given.get("position_bias") is not None:
        return plain_attention(module, query, key, value, mask, **given)
    scaling = float(given.get("scaling") or query.shape[-1] ** -0.5)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    hidden = torch.where(mask[:, 0, 0], 0.0, HIDDEN / scaling)[:, :, None, None].expand_as(key[..., :1])
    query, key = torch.cat([query, torch.ones_like(hidden)], -1), torch.cat([key, hidden], -1)
    made: Any = _Attention
    return made.apply(query, key, value, scaling, int(query.shape[2])), None
