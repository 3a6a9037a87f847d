"""The `t2 export` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from t2.cli.options import Model, ModelDtype


def run(
    model: Model,
    expert: Annotated[Path, arg(metavar="FILE")],
    output: Annotated[Path, arg(metavar="FOLDER")],
    format: Literal["merged", "peft", "lora", "vllm"] = "merged",
    rank: int = 128,
    model_dtype: ModelDtype = "float32",
) -> int:
    """Write an expert for other programs: a merged model, a LoRA adapter, or z as an adapter for PEFT or vLLM.

    Example: t2 export smollm2-135m-instruct --expert runs/sums/best.safetensors --output sums-lora --format lora

    Args:
        expert: Expert file.
        output: Folder that is made.
        format: The whole model with the expert built in; z as an adapter of t2.integrations.peft; a LoRA adapter; or z
            as an adapter for vLLM with this package's plug-in.
        rank: Rank of the LoRA adapter: that many components of each matrix are kept.
        model_dtype: Dtype of the base model that the expert was trained for, and of a merged one.
    """
    import torch

    from t2.experts.expert import Expert
    from t2.integrations.export import export_lora, export_merged, export_peft, export_vllm
    from t2.model.load import load_svf
    from t2.model.svf_model import SVFConfig

    vector = Expert.load(expert)
    config = SVFConfig(list(vector.layout.names), verify=False)
    svf, tokenizer = load_svf(model, config, dtype=getattr(torch, model_dtype))
    if format == "merged":
        export_merged(svf, tokenizer, vector, output)
    elif format == "peft":
        export_peft(svf, vector, output)
    elif format == "vllm":
        export_vllm(svf, vector, output)
    else:
        loss = export_lora(svf, vector, output, rank)
        name, least = loss.worst
        print(f"rank {loss.rank} keeps {loss.kept:.1%} of the change of the weights; {name} least, {least:.1%}")
    print(f"written to {output}")
    return 0
