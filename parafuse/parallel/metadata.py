"""Torch functions that ask a tensor what it is, not for its values: our own kinds of tensor answer them themselves."""

from __future__ import annotations

import torch
from torch import Tensor

_ATTRIBUTES = "shape dtype device ndim requires_grad is_cuda is_meta layout is_quantized grad_fn is_sparse is_leaf"
METADATA = {
    *(vars(torch._C.TensorBase)[name].__get__ for name in _ATTRIBUTES.split()),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.__len__, Tensor.get_device, Tensor.__hash__, Tensor.element_size),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
