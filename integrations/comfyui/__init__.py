"""Node package of zimage-mxfp8 for ComfyUI: a folder of custom_nodes."""

from zimage_mxfp8.comfy import register_backend
from zimage_mxfp8.comfy.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

register_backend()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
