"""Models without numbers: shapes and dtypes on torch's meta device, adapted as real ones are.

Run there, a model allocates what it would allocate elsewhere, save for three things that are put
right in `standing_for`: which attention kernel is taken, how dropout keeps its mask, and (in
`ledger`) what a fused kernel allocates inside.

Letters: B batch, H heads, Q queries, D head dimension.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from llm_emo import attention, methods, recipes, trie
from llm_emo.errors import ModelError
from llm_emo.models import auto, bundled, loading, quantised
from llm_emo.models.chatglm2 import CHATGLM2_6B
from llm_emo.models.ledger import CPU_KERNEL, CUDA_KERNEL, Ledger

Kind = Literal["cpu", "cuda"]
"""The kind of device that is meant."""

META = torch.device("meta")


# --- models without numbers -----------------------------------------------------------------------


def config_of(spec: recipes.Model) -> tuple[Any, bool]:
    """Return the transformers config of a recipe's model; no weights are read.

    Returns:
        The config, and whether it is that of ChatGLM2-6B standing in for a folder that is not
        there, whose name says that it will hold it.

    Raises:
        ModelError: there is no such model.
    """
    source = spec.name
    if spec.origin == "bundled":
        source = str(bundled.folder())
    elif spec.origin == "folder":
        folder = Path(spec.name).expanduser()
        source = str(folder)
        if not folder.exists() and "chatglm2" in folder.name.lower():
            return AutoConfig.for_model(**CHATGLM2_6B.native_config()), True
    try:
        found = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=False)
    except loading.REFUSED as error:
        auto.load_tokenizer(spec)  # says in one message what is wrong with the folder or the hub
        reason = loading.reason(error)
        raise ModelError(f"{spec.name}: its config.json cannot be read: {reason}") from error
    return found, False


@dataclass(frozen=True)
class Drawing:
    """An adapted model on the meta device, and what it holds.

    `weights` are the bytes of the base as it is kept, `adapter` those that the method adds to
    them, `trainable` those of what learns (for full fine-tuning, the base itself). `parameters`
    counts the base's parameters, whatever they are kept as.
    """

    base: PreTrainedModel
    model: nn.Module
    ledger: Ledger
    weights: int
    adapter: int
    trainable: int
    parameters: int
    learning: int
    """How many parameters learn."""

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's two moments, which have the dtype of what learns."""
        return 2 * self.trainable

    @property
    def multiplied(self) -> int:
        """How many of the base's parameters are multiplied with every node or logit."""
        embedding = self.base.get_input_embeddings().weight
        head = self.base.get_output_embeddings()
        tied = head is not None and head.weight is embedding
        return self.parameters - (0 if tied else int(embedding.numel()))


def draw(config: Any, method: recipes.Method, *, dtype: torch.dtype, quantization: str) -> Drawing:
    """Build the model of `config` on the meta device and adapt it.

    Args:
        config: A transformers config; it is changed.
        method: The recipe's method.
        dtype: Of weights and activations.
        quantization: How the base is kept: none, nf4 or int8.

    Raises:
        ModelError: the method does not fit the architecture.
    """
    text = config.get_text_config()
    if isinstance(method, recipes.PTuningV2):  # what a prefix starts from changes no size, either
        method = method.model_copy(update={"init": "random", "init_text": None})
    ledger = Ledger("meta", int(text.vocab_size))
    with ledger, META:
        base = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME
        )
        if quantization in ("nf4", "int8"):
            _quantise(base, quantised.config(quantization, dtype), dtype)  # type: ignore[arg-type]
        weights, parameters = ledger.live, methods.count_parameters(base).total
        model = methods.adapt(base, method)
    return Drawing(
        base=base,
        model=model,
        ledger=ledger,
        weights=weights,
        adapter=ledger.live - weights,
        trainable=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        parameters=parameters,
        learning=methods.count_parameters(model).trainable,
    )


def _quantise(base: PreTrainedModel, how: Any, dtype: torch.dtype) -> None:
    """Do with a model on the meta device what loading does with a real one."""
    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # in which the new layers are made
    try:
        quantizer.preprocess_model(model=base, device_map=None, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.weight = _four_bits(module, dtype)
        elif isinstance(module, Linear8bitLt):
            module.weight = module.weight._quantize(META)
    quantizer.postprocess_model(base)
    quantised.settle(base)


def _four_bits(layer: Linear4bit, dtype: torch.dtype) -> Params4bit:
    """Return the weight of `layer` in NF4 with double quantisation, as bitsandbytes keeps it.

    Two numbers to a byte; one scale of eight bits for 64 of them, one of 32 for 256 scales. Not by
    bitsandbytes itself, which would keep a table without numbers for the rest of the process.
    """
    shape, count = layer.weight.shape, layer.weight.numel()
    scales = -(-count // 64)
    nested = QuantState(
        absmax=torch.empty(-(-scales // 256)),
        code=torch.empty(256),
        blocksize=256,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=shape,
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=nested,
    )
    layer.quant_state = state
    return Params4bit(
        torch.empty((count + 1) // 2, 1, dtype=torch.uint8),
        quant_state=state,
        blocksize=64,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )


# --- the meta device, behaving as another ---------------------------------------------------------


@contextlib.contextmanager
def standing_for(kind: Kind) -> Iterator[None]:
    """While open, the meta device takes the kernels that `kind` of device would take.

    Left to itself it takes the plain form of attention, which keeps the scores for the backward
    pass, and a dropout that keeps its mask in the dtype of the activations.

    - `cuda`: memory-efficient attention, the one fused kernel that takes any mask; it keeps the
      output, one number per row, and the mask in the dtype of the queries, padded. Dropout keeps
      a byte per element. FlashAttention takes no mask, so it is never assumed.
    - `cpu`: this program's attention in pieces (see `branches`) where that pays, which keeps its
      scores; else torch's fused kernel for CPUs, or, in bfloat16 and for small passes, this
      program's plain attention (see `attention`), which keeps them too.

    Functions are exchanged in their modules rather than caught by a `TorchFunctionMode`, because
    such a mode is off while the backward pass recomputes layers.
    """
    exchanged: list[tuple[Any, str, Any]] = [
        (nn.functional, "scaled_dot_product_attention", _on_meta(_fused(kind))),
    ]
    if kind == "cuda":
        exchanged.append((nn.functional, "dropout", _on_meta(_byte_dropout)))
    else:
        exchanged.append((attention, "sdpa_attention_forward", _on_meta(_cpu_attention, at=1)))
        exchanged.append((trie, "_in_pieces", lambda _: lambda device: True))
    with contextlib.ExitStack() as stack:
        for owner, name, make in exchanged:
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, make(original))
        yield


def _on_meta(instead: Callable[..., Any], at: int = 0) -> Callable[..., Callable[..., Any]]:
    """Return what makes of a function one that is `instead` where argument `at` is on meta.

    `instead` is given the original first.
    """

    def exchange(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if args[at].device == META:
                return instead(original, *args, **kwargs)
            return original(*args, **kwargs)

        return call

    return exchange


def _byte_dropout(
    original: Callable[..., Tensor], x: Tensor, p: float, training: bool, inplace: bool
) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else original(x, p, training)


def _cpu_attention(
    original: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    # The same question that `attention` asks of a tensor on a CPU.
    if (
        mask is not None
        and mask.dtype == torch.bool
        and query.dtype == torch.bfloat16
        and query.shape[2] * key.shape[2] <= attention.PLAIN_SCORES
        and not kwargs.get("dropout")
    ):
        return attention._plain(query, key, value, mask, kwargs.get("scaling")), None
    return original(module, query, key, value, mask, **kwargs)


def _fused(kind: Kind) -> Callable[..., Tensor]:
    def attend(
        original: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        scale: float | None,
        is_causal: bool,
    ) -> Tensor:
        """Call the kernel that the device would choose; (B, H, Q, D) -> (B, H, Q, D)."""
        bias = attn_mask
        if bias is not None and bias.dtype == torch.bool:  # torch converts it in every layer
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        if kind == "cpu":
            out, _ = CPU_KERNEL(
                query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
            )
            return out  # type: ignore[no-any-return]
        if bias is not None:
            columns = bias.shape[-1]
            if columns % 16:  # its rows are read in aligned pieces
                bias = nn.functional.pad(bias, (0, 16 - columns % 16))[..., :columns]
            bias = bias.expand(*query.shape[:2], *bias.shape[-2:])
        keeps = torch.is_grad_enabled() and query.requires_grad
        out, *_ = CUDA_KERNEL(query, key, value, bias, keeps, dropout_p, is_causal, scale=scale)
        return out  # type: ignore[no-any-return]

    return attend
