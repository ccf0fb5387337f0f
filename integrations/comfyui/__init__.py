"""Nodes of ComfyUI that let a parafuse server paint. README.md says how to install them."""

from .nodes import Decode, Edit, Encode, Generate

NODE_CLASS_MAPPINGS = {
    "ParafuseGenerate": Generate,
    "ParafuseEdit": Edit,
    "ParafuseDecode": Decode,
    "ParafuseEncode": Encode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ParafuseGenerate": "parafuse: generate",
    "ParafuseEdit": "parafuse: edit",
    "ParafuseDecode": "parafuse: decode latents",
    "ParafuseEncode": "parafuse: encode pictures",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
