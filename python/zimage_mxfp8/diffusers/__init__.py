"""A quantizer for diffusers' own `ZImageTransformer2DModel`. Importing this module registers it.

from diffusers import ZImageTransformer2DModel
from zimage_mxfp8.diffusers import ZImageMXFP8Config

transformer = ZImageTransformer2DModel.from_pretrained(
    "Z-Image-Turbo", subfolder="transformer", quantization_config=ZImageMXFP8Config()
)
transformer.save_pretrained("Z-Image-Turbo-mxfp8/transformer")
"""

from ..system.optional_packages import needed

with needed("generate", "zimage_mxfp8.diffusers"):
    import diffusers  # noqa: F401 - the library; if it is missing, this names it

    from .config import ZImageMXFP8Config
    from .linear import MXFP8Linear, set_compute
    from .quantizer import ZImageMXFP8Quantizer, quantize_, register

__all__ = [
    "MXFP8Linear",
    "ZImageMXFP8Config",
    "ZImageMXFP8Quantizer",
    "quantize_",
    "set_compute",
]

register()
