"""Makes a quantized model what diffusers or transformers would have made of it: so it is saved and loaded by theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from parafuse.engine.quantize.pack import equivalent
from parafuse.quantization import Quantize

_MISSING = object()


def mark(model: nn.Module, method: Quantize) -> Callable[[], None] | None:
    """Sets what their `from_pretrained` sets with a TorchAoConfig; the returned function undoes it. None for a module
    of neither library, which nothing saves."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    if isinstance(model, ModelMixin):
        return _mark_diffusers(model, method)
    if isinstance(model, PreTrainedModel):
        return _mark_transformers(model, method)
    return None


def _mark_diffusers(model: Any, method: Quantize) -> Callable[[], None]:
    from diffusers import TorchAoConfig
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    config = TorchAoConfig(equivalent(method))
    quantizer: Any = DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
    quantizer.validate_environment()
    before = model.config
    undo = _set(
        model,
        hf_quantizer=quantizer,
        is_quantized=True,
        quantization_method=config.quant_method,
    )
    model.register_to_config(quantization_config=config)

    def taken_off() -> None:
        undo()
        model._internal_dict = before

    return taken_off


def _mark_transformers(model: Any, method: Quantize) -> Callable[[], None]:
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    config = TorchAoConfig(equivalent(method))
    undo = _set(model, hf_quantizer=AutoHfQuantizer.from_config(config, pre_quantized=True))
    undo_config = _set(model.config, quantization_config=config)

    def taken_off() -> None:
        undo_config()
        undo()

    return taken_off


def _set(target: Any, **values: Any) -> Callable[[], None]:
    """Sets attributes of an instance; the returned function puts back what was there."""
    before = {name: vars(target).get(name, _MISSING) for name in values}
    for name, value in values.items():
        setattr(target, name, value)

    def undo() -> None:
        for name, value in before.items():
            if value is _MISSING:
                delattr(target, name)
            else:
                setattr(target, name, value)

    return undo
