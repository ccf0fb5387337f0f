"""What ranks of tests need, imported once (`ranks.py`)."""

import diffusers  # noqa: F401
import torch
import torch.distributed  # noqa: F401
import transformers  # noqa: F401
from diffusers import FluxPipeline, StableDiffusion3Pipeline, WanPipeline  # noqa: F401
from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401

import parafuse.engine.engine  # noqa: F401
