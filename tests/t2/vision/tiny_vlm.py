"""Tiny random image-text models of each family with processors made offline, and questions about coloured images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    SmolVLMConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from t2.tasks import Problem, Split, Task, prompt_text
from t2.weights.loading import images_only

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "User:", "Assistant:", "what", "colour", "is", "it", "red", "green", "blue")
SPECIAL = (
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = (*WORDS, *SPECIAL)
IMAGE = VOCABULARY.index("<image>")
TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GRID = [[28, 56], [56, 28], [56, 56]]
TEMPLATE = (
    "{% for m in messages %}{{ 'User: ' if m['role'] == 'user' else 'Assistant: ' }}"
    "{% if m['content'] is string %}{{ m['content'] }} {% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )


def llava_next() -> tuple[PreTrainedConfig, Any]:
    config = LlavaNextConfig(
        text_config=MistralConfig(**TEXT, sliding_window=None),
        vision_config=CLIPVisionConfig(**VISION, image_size=28, patch_size=14, projection_dim=16),
        image_token_index=IMAGE,
        image_grid_pinpoints=GRID,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=GRID
        ),
        tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return config, processor


def idefics3(config_class: Any = Idefics3Config) -> tuple[PreTrainedConfig, Any]:
    config = config_class(
        text_config=LlamaConfig(**TEXT),
        vision_config=VISION | {"image_size": 28, "patch_size": 7},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        tiny_tokenizer(),
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return config, processor


def smolvlm() -> tuple[PreTrainedConfig, Any]:
    return idefics3(SmolVLMConfig)


def qwen2_5_vl() -> tuple[PreTrainedConfig, Any]:
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=VOCABULARY.index("<|image_pad|>"),
        video_token_id=VOCABULARY.index("<|video_pad|>"),
        vision_start_token_id=VOCABULARY.index("<|vision_start|>"),
        vision_end_token_id=VOCABULARY.index("<|vision_end|>"),
    )
    processor = images_only(Qwen2_5_VLProcessor)(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 12}),
        tiny_tokenizer(),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return config, processor


FAMILIES: dict[str, Callable[[], tuple[PreTrainedConfig, Any]]] = {
    "llava_next": llava_next,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_5_vl": qwen2_5_vl,
}


def tiny_vlm(family: str, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """A random model of the family in float32, and its processor."""
    config, processor = FAMILIES[family]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():  # away from the tiny initial range, so that images and experts change tokens
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.25)
    return model, processor


COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (10, 10, 230)}
SIZES = ((80, 60), (28, 28), (50, 120))


def picture(colour: str, size: tuple[int, int]) -> Image.Image:
    """A coloured picture with a gradient, so that no two sizes look alike."""
    image = Image.new("RGB", size, COLOURS[colour])
    for x in range(size[0]):
        image.putpixel((x, x % size[1]), (x * 6 % 256, 128, 255 - x % 256))
    return image


def question(colour: str, size: tuple[int, int], text: str = "what colour is it", solution: bool = True) -> Problem:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return Problem(
        messages=({"role": "user", "content": content},),
        reference=colour,
        solution=colour if solution else None,
        images=(picture(colour, size),),
    )


class Colours(Task):
    """Say the colour of the picture. Rewarded is any word before it in the alphabet, so that random answers differ."""

    name = "colours"
    max_new_tokens = 2

    def problems(self, split: Split) -> Sequence[Problem]:
        return [
            question(c, size, text) for c, size in zip(COLOURS, SIZES, strict=True) for text in ("what colour", "is it")
        ]

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [float(a.split()[:1] == [p.reference]) for p, a in zip(problems, answers, strict=True)]

    def rewards(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [1.0 if a.split()[:1] < [p.reference] else -1.0 for p, a in zip(problems, answers, strict=True)]


def batch_of(processor: Any, problems: Sequence[Problem]) -> dict[str, torch.Tensor]:
    """What the processor itself makes of the prompts as one batch."""
    images = [list(problem.images) for problem in problems]
    flat = images if isinstance(processor, Idefics3Processor) else [image for each in images for image in each]
    texts = [prompt_text(problem, processor) for problem in problems]
    return dict(processor(text=texts, images=flat, return_tensors="pt", padding=True, add_special_tokens=False))
