"""Nodes of ComfyUI that let a parafuse server paint. README.md says how to install them."""

from .nodes import Edit, Generate

NODE_CLASS_MAPPINGS = {"ParafuseGenerate": Generate, "ParafuseEdit": Edit}
NODE_DISPLAY_NAME_MAPPINGS = {"ParafuseGenerate": "parafuse: generate", "ParafuseEdit": "parafuse: edit"}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
