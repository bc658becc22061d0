"""ChatGLM2-6B's shape with random weights, made on the device itself.

The skeleton stands on the meta device; each tensor is made where it will be used and, for NF4,
quantised before the next one is made. So no copy of the model ever lies in the host's memory, and
under NF4 the device holds one bfloat16 layer beside the quantised ones.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from llm_emo import attention
from llm_emo.models.chatglm2 import CHATGLM2_6B, Layout

Quantization = Literal["none", "nf4"]

SMALL = replace(
    CHATGLM2_6B, layers=4, hidden=256, ffn=856, heads=8, head_dim=32, vocab=1024
)  # fmt: skip
"""For exactness in float32: the same proportions, in megabytes."""
TINY = replace(CHATGLM2_6B, layers=2, hidden=64, ffn=96, heads=4, head_dim=16, vocab=512)


def build(
    layout: Layout,
    *,
    dtype: torch.dtype,
    quantization: Quantization,
    device: torch.device,
    seed: int,
) -> PreTrainedModel:
    """Return a model of these sizes with random weights on `device`, in eval mode.

    Args:
        layout: Its sizes, such as `CHATGLM2_6B`.
        dtype: Of the weights and activations; of what NF4 computes in.
        quantization: `none` or `nf4`.
        device: Where every tensor is made.
        seed: Of the weights.

    Raises:
        ImportError: NF4 is asked for and bitsandbytes cannot be imported.
        torch.OutOfMemoryError: it does not fit.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**layout.native_config()),
            dtype=dtype,
            attn_implementation=attention.NAME,
        )
    quantizer: Any = None
    if quantization != "none":
        from llm_emo.models import quantised

        # The same steps as in `from_pretrained`, around tensors that come from no file.
        quantizer = AutoHfQuantizer.from_config(quantised.config(quantization, dtype))
        quantizer.validate_environment(device_map={"": device})
        quantizer.preprocess_model(model=model, device_map={"": device})
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, _filled(module, name, parameter, dtype, generator))
    # Its frequencies are buffers, computed in its constructor.
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(model.config).to(device)
    lost = [name for name, tensor in tensors(model).items() if tensor.device.type == "meta"]
    assert not lost, f"never made: {lost[:3]}"
    if quantizer is not None:
        quantizer.postprocess_model(model)
        quantised.settle(model)
    model.requires_grad_(False)
    return model.eval()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _filled(
    module: nn.Module, name: str, skeleton: Any, dtype: torch.dtype,
    generator: torch.Generator,
) -> nn.Parameter:  # fmt: skip
    """Return the parameter with values: hidden states and logits come out of order 1."""
    shape = skeleton.shape
    made = torch.empty(shape, dtype=dtype, device=generator.device)
    if made.dim() == 1:
        made.fill_(1.0) if name == "weight" else made.zero_()
    else:
        spread = 1.0 if isinstance(module, nn.Embedding) else shape[1] ** -0.5
        made.normal_(0.0, spread, generator=generator)
    if type(skeleton).__name__ != "Params4bit":
        return nn.Parameter(made, requires_grad=False)
    from bitsandbytes.nn import Params4bit

    packed: nn.Parameter = Params4bit(
        made,
        requires_grad=False,
        compress_statistics=skeleton.compress_statistics,
        quant_type=skeleton.quant_type,
        quant_storage=skeleton.quant_storage,
        module=module,
    ).to(generator.device)
    return packed
