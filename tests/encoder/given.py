"""What the tests of the encoder are given: tiny models of every family, and what transformers and PEFT make of them."""

import copy
import itertools
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedTokenizerFast

from tests.conftest import WORDS, save_tiny_model
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.lora import zero_start

TEXTS = [" ".join(WORDS[start : start + 1 + start * 7 % 20]) for start in range(40)]

SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
DEBERTA_2 = {**DEBERTA, "position_buckets": 8}
DEBERTA_3 = {**DEBERTA_2, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
MODERNBERT = {"global_attn_every_n_layers": 3, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}
of = partial(AutoConfig.for_model, **SIZES)
SPLIT: dict[str, PreTrainedConfig] = {
    **{kind: of(kind) for kind in ("bert", "roberta", "xlm-roberta", "camembert", "mpnet")},
    "distilbert": of("distilbert", hidden_dim=64),
    "electra": of("electra", embedding_size=32),
    "electra-small": of("electra", embedding_size=16),  # embeddings narrower than the layers
    "deberta": of("deberta", **DEBERTA),
    "deberta-v2": of("deberta-v2", **DEBERTA_2),
    "deberta-v3": of("deberta-v2", **DEBERTA_3),
    "modernbert": of("modernbert", **MODERNBERT),
}
UNSPLIT: dict[str, PreTrainedConfig] = {
    "megatron-bert": of("megatron-bert"),  # has a layer norm after the layers that both halves would run
    "eurobert": of("eurobert", num_key_value_heads=2),  # its heads share keys and values
}
FAMILIES = SPLIT | UNSPLIT
TARGETS = {"megatron-bert": ("query", "value"), "eurobert": ("q_proj", "v_proj")}  # there are no default ones


def save_family(folder: Path, family: str) -> str:
    """Save a random model of a family with the tiny tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_tiny_model(folder, AutoModel.from_config(FAMILIES[family]))


# language → label → words of which texts are made
LANGUAGES = {
    "chinese": {"天气": "今天 下雨 刮风 晴朗", "音乐": "播放 歌曲 钢琴 音量", "银行": "余额 转账 账户 利息"},
    "arabic": {"طقس": "اليوم مطر رياح مشمس", "موسيقى": "شغّل أغنية بيانو صوت", "بنك": "رصيد تحويل حساب فائدة"},
    "hindi": {"मौसम": "आज बारिश हवा धूप", "संगीत": "चलाओ गाना पियानो आवाज़", "बैंक": "शेष भेजो खाता ब्याज"},
    "russian": {"погода": "сегодня дождь ветер", "музыка": "включи песню громче", "банк": "остаток перевод счёт"},
}


def rows_of(language: str) -> list[tuple[str, str]]:
    """Return texts of each class, with their labels: its words in every order."""
    between = "" if language == "chinese" else " "
    pairs = LANGUAGES[language].items()
    return [(between.join(some), label) for label, words in pairs for some in itertools.permutations(words.split(), 3)]


def save_multilingual(folder: Path, family: str) -> str:
    """Save a random model of a family with a unigram tokenizer of these languages, without a Latin letter in it."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = {word for classes in LANGUAGES.values() for own in classes.values() for word in own.split()}
    pieces = [*sorted(words), *sorted({"▁", *"".join(words)})]
    scored = [(piece, 0.0) for piece in special] + [(piece, -3.0 * len(piece) ** 0.5) for piece in pieces]
    tokenizer = Tokenizer(Unigram(scored, unk_id=3))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    config = copy.deepcopy(FAMILIES[family])
    config.vocab_size, config.pad_token_id, config.max_position_embeddings = tokenizer.get_vocab_size(), 1, 160
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


def moved_factors(encoder: Encoder, seed: int = 0) -> dict[str, Tensor]:
    """LoRA factors of which each counts."""
    generator = torch.Generator().manual_seed(seed)
    start = zero_start(encoder.factor_shapes, seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.items()}


def states_of(encoder: Encoder, texts: list[str], factors: dict[str, Tensor] | None = None) -> list[Tensor]:
    """Return transformers' hidden states (layers + 1, length, d) of each text alone, with PEFT's own LoRA if given."""
    model = AutoModel.from_pretrained(encoder.settings.model, dtype=torch.float32)
    if factors is not None:
        model = get_peft_model(model, encoder.peft_config)
        weights = {
            name.removeprefix("base_model.model.").replace(".default", ""): value
            for name, value in model.named_parameters()
        }
        for name, value in factors.items():
            assert weights[name].shape == value.shape
            weights[name].data = value.clone()
    found = []
    for text in texts:
        ids = encoder.tokenizer(text, truncation=True, max_length=encoder.settings.max_length, return_tensors="pt")
        ids = {key: ids[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            found.append(torch.cat(model.eval()(**ids, output_hidden_states=True).hidden_states))
    return found


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
