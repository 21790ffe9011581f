"""For ComfyUI: a backend of comfy-kitchen, and the nodes of integrations/comfyui."""

from .backend import register_backend

__all__ = ["register_backend"]
