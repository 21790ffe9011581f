"""The VAE: diffusers' AutoencoderKL, small, trained on the scenes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

CHANNELS = 16
_WIDTHS = (16, 32, 64, 64)  # 8 pixels per latent, as Z-Image's own
_BATCH, _KL = 32, 2e-4


def make_vae() -> AutoencoderKL:
    """Make the VAE with random weights."""
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=_WIDTHS,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def train_vae(
    images: torch.Tensor, steps: int, device: str, log: Callable[[str], None]
) -> AutoencoderKL:
    """Train the VAE, and measure the scale and shift of its latents.

    Args:
        images: [N, 3, 128, 128], bytes, on the device.
        steps: of 32 random images each.
        device: where to train.
        log: takes a line of progress.
    """
    vae = make_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    random = np.random.default_rng(3)
    begin = time.perf_counter()
    for step in range(steps):
        rate = min(1, (step + 1) / 100) * max(0.02, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        chosen = torch.from_numpy(random.integers(len(images), size=_BATCH)).to(device)
        batch = _load(images[chosen])
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        difference = decoded.float() - batch
        error = difference.abs().mean() + 4 * difference.square().mean()
        loss = error + _KL * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            psnr = -10 * torch.log10(F.mse_loss(decoded.float(), batch) / 4)
            log(
                f"vae step {step + 1} of {steps}, {time.perf_counter() - begin:.0f} s, "
                f"PSNR {psnr:.1f} dB"
            )
    latents = encode(vae.eval(), images[:512], device)
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, device: str) -> torch.Tensor:
    """Return the means of the posterior, float32 [N, 16, 16, 16], without scale and shift.

    `images` are bytes [N, 3, 128, 128], on the device.
    """
    parts = []
    for batch in images.split(64):
        batch = _load(batch)
        with torch.autocast(device, torch.bfloat16):
            parts.append(vae.encode(batch).latent_dist.mean.float().cpu())
    return torch.cat(parts)


def _load(images: torch.Tensor) -> torch.Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    return images.float().div_(127.5).sub_(1)
