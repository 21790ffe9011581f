"""The transformer: diffusers' ZImageTransformer2DModel, trained by flow matching on latents.

First on pairs of noise and scene (Lipman et al., 2023, arXiv:2210.02747), then on pairs of noise
and the scene that the model itself draws from it (reflow; Liu et al., 2022, arXiv:2209.03003).
That straightens the paths so that eight steps suffice.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel

from .text import FEATURES

LATENT_SIDE = 16
_IMAGE_TOKENS = (LATENT_SIDE // 2) ** 2
_CAPTION_TOKENS = 32
_SHIFT = 3.0  # of the scheduler
_AVERAGE = 0.999  # of the weights that are kept, per step
_WARM_UP = 500  # steps
_LOGGED = 500  # steps
_EAGER_CALLS = 3  # before a graph: they compile, and make the optimizer's state
_ALIGNMENT = 8  # columns that tensor cores read at once in BF16


@dataclass(frozen=True)
class Captions:
    """Features of all captions, padded at the end.

    Attributes:
        features: [N, 32, 96].
        lengths: int64 [N].
    """

    features: torch.Tensor
    lengths: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> Captions:
        return Captions(self.features[index], self.lengths[index])


def pad_captions(features: list[torch.Tensor], device: str) -> Captions:
    """Pad captions as the model does: with their last row, where its pad token goes."""
    padded = torch.stack(
        [torch.cat([x, x[-1:].expand(_CAPTION_TOKENS - len(x), -1)]) for x in features]
    )
    lengths = torch.tensor([len(x) for x in features])
    return Captions(padded.to(device), lengths.to(device))


def make_transformer(dim: int) -> ZImageTransformer2DModel:
    """Make a transformer with all of Z-Image's blocks and random weights."""
    torch.manual_seed(4)
    model = ZImageTransformer2DModel(
        dim=dim,
        n_heads=dim // 128,
        n_kv_heads=dim // 128,
        cap_feat_dim=FEATURES,
        axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512],
    )
    for name, parameter in model.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def pad_feed_forward(model: ZImageTransformer2DModel) -> None:
    """Pad w1, w3 and w2 with zeros to a multiple of 8, in place, for faster products.

    Padded weights stay zero in training: their gradients are zero.
    """
    for layer in _blocks(model):
        ff = layer.feed_forward
        width = ff.w1.weight.shape[0]
        more = -width % _ALIGNMENT
        for linear in (ff.w1, ff.w3):
            linear.weight = torch.nn.Parameter(F.pad(linear.weight.detach(), (0, 0, 0, more)))
        ff.w2.weight = torch.nn.Parameter(F.pad(ff.w2.weight.detach(), (0, more)))


def cut_feed_forward(model: ZImageTransformer2DModel, width: int) -> None:
    """Undo `pad_feed_forward`: keep `width` features.

    Raises:
        ValueError: what is cut is not zero.
    """
    for layer in _blocks(model):
        ff = layer.feed_forward
        for linear, dim in ((ff.w1, 0), (ff.w3, 0), (ff.w2, 1)):
            weight = linear.weight.detach()
            if weight.narrow(dim, width, weight.shape[dim] - width).any():
                raise ValueError("padded weights of a feed-forward are not zero")
            linear.weight = torch.nn.Parameter(weight.narrow(dim, 0, width).contiguous())


def _blocks(model: ZImageTransformer2DModel) -> list[torch.nn.Module]:
    return [*model.noise_refiner, *model.context_refiner, *model.layers]


def to_patches(latents: torch.Tensor) -> torch.Tensor:
    """[N, 16, 16, 16] to [N, 64, 64], in the model's order."""
    side = LATENT_SIDE // 2
    patches = latents.view(len(latents), 16, side, 2, side, 2)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(len(latents), _IMAGE_TOKENS, 64)


class BatchedModel:
    """The forward of the model for batches of one caption length: no lists, no masks.

    Padding of a caption depends on its length, which the model puts into positions; with 32
    positions for all captions, padded ones differ in the pad token alone.
    """

    def __init__(
        self, model: ZImageTransformer2DModel, device: str, compiled: bool = False
    ) -> None:
        self.model = model
        stacks = (model.noise_refiner, model.context_refiner, model.layers)
        self._noise_refiner, self._context_refiner, self._layers = (
            [
                torch.compile(layer, fullgraph=True, dynamic=False, disable=not compiled)
                for layer in stack
            ]
            for stack in stacks
        )
        image = torch.zeros(16, 1, LATENT_SIDE, LATENT_SIDE, device=device)
        positions = [
            model.patchify_and_embed([image], [torch.zeros(n, FEATURES, device=device)], 2, 1)
            for n in range(1, _CAPTION_TOKENS + 1)
        ]
        embed = model.rope_embedder
        with torch.no_grad():
            self._image = embed(positions[0][3][0])
            # The positions of pads are zero.
            self._caption = torch.stack([embed(x[4][0][:_CAPTION_TOKENS]) for x in positions])

    def __call__(self, x: torch.Tensor, t: torch.Tensor, captions: Captions) -> torch.Tensor:
        """Velocity of patches [N, 64, 64] at times [N]."""
        model, n = self.model, len(x)
        time_features = model.t_embedder(t * model.t_scale)
        image_rotations = self._image.expand(n, -1, -1)
        rotations = self._caption[captions.lengths - 1]
        hidden = model.all_x_embedder["2-1"](x).float()  # under autocast too
        for layer in self._noise_refiner:
            hidden = layer(hidden, None, image_rotations, time_features)
        pads = torch.arange(_CAPTION_TOKENS, device=x.device) >= captions.lengths[:, None]
        caption = model.cap_embedder(captions.features).float()
        caption = torch.where(pads[..., None], model.cap_pad_token, caption)
        for layer in self._context_refiner:
            caption = layer(caption, None, rotations)
        hidden = torch.cat([hidden, caption], 1)
        rotations = torch.cat([image_rotations, rotations], 1)
        for layer in self._layers:
            hidden = layer(hidden, None, rotations, time_features)
        result: torch.Tensor = model.all_final_layer["2-1"](hidden, c=time_features)
        return result[:, :_IMAGE_TOKENS]


def check_batched(model: ZImageTransformer2DModel, captions: Captions, device: str) -> float:
    """Return the relative difference between the batched forward and the model's own."""
    generator = torch.Generator().manual_seed(5)
    few = captions[torch.arange(4, device=device)]
    x = torch.randn(4, 16, LATENT_SIDE, LATENT_SIDE, generator=generator).to(device)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], device=device)
    own = [f[:n] for f, n in zip(few.features, few.lengths.tolist(), strict=True)]
    with torch.no_grad():
        want = model([item[:, None] for item in x], t, own, return_dict=False)[0]
        want = to_patches(torch.stack(want)[:, :, 0])
        found = BatchedModel(model, device)(to_patches(x), t, few)
    return float((found - want).norm() / want.norm())


def steps_of(count: int) -> list[float]:
    """Return times of Euler steps, shifted as the scheduler does: 0 is noise, 1 the image."""
    sigmas = [1 - i / count for i in range(count)]
    return [1 - _SHIFT * s / (1 + (_SHIFT - 1) * s) for s in sigmas] + [1.0]


def _velocity(model: BatchedModel, device: str) -> Callable[..., torch.Tensor]:
    """Return the velocity as a function of tensors.

    Gradients stay enabled: without them torch.compile would compile every block again.
    """

    def velocity(
        x: torch.Tensor, t: torch.Tensor, features: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(x, t, Captions(features, lengths)).detach().float()

    return velocity


def _euler(
    velocity: Callable[..., torch.Tensor], noise: torch.Tensor, captions: Captions, steps: int
) -> torch.Tensor:
    """Return patches of latents [N, 64, 64] that Euler steps draw from noise."""
    for begin, end in itertools.pairwise(steps_of(steps)):
        t = torch.full((len(noise),), begin, device=noise.device)
        noise = noise + (end - begin) * velocity(noise, t, captions.features, captions.lengths)
    return noise


class _Captured:
    """A function of tensors of constant sizes; on CUDA a graph from the fourth call on."""

    def __init__(self, function: Callable[..., torch.Tensor], device: str) -> None:
        self._function, self._device = function, device
        self._calls = 0
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = torch.empty(())

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the function's result, which the next call overwrites."""
        self._calls += 1
        if self._device == "cpu":
            return self._function(*inputs)
        if self._calls <= _EAGER_CALLS:
            stream = torch.cuda.Stream()  # the graph must not wait for gradients of the main one
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._result = self._function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return self._result
        if self._graph is None:
            self._inputs = tuple(x.clone() for x in inputs)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._function(*self._inputs)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        return self._result


@dataclass(frozen=True)
class Schedule:
    """How long each part of the training takes.

    Attributes:
        batch: pairs per step.
        flow_steps: on noise and scenes.
        pairs: of noise and the model's own images.
        pair_steps: Euler steps to draw one of them.
        reflow_steps: on these pairs.
    """

    batch: int = 256
    flow_steps: int = 13000
    pairs: int = 32768
    pair_steps: int = 16
    reflow_steps: int = 2500


def train_transformer(
    model: ZImageTransformer2DModel,
    latents: torch.Tensor,
    captions: Captions,
    schedule: Schedule,
    device: str,
    log: Callable[[str], None],
) -> ZImageTransformer2DModel:
    """Train a model in place, and return it with the average of its weights over the last steps.

    Args:
        model: in float32, on the device.
        latents: [N, 64, 64], scaled and shifted, on the device.
        captions: of the N scenes, on the device.
        schedule: how long.
        device: "cpu" or "cuda".
        log: takes a line of progress.
    """
    width = model.layers[0].feed_forward.w1.weight.shape[0]
    pad_feed_forward(model)
    batched = BatchedModel(model, device, compiled=True)
    random = torch.Generator(device).manual_seed(6)
    trainer = _Trainer(model, batched, schedule.batch, random, device, log)

    def scenes(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = latents[index].float()
        return torch.randn(images.shape, generator=random, device=device), images

    trainer.run("flow", schedule.flow_steps, 1e-3, len(latents), captions, scenes)
    trainer.use_average()
    starts, ends = _draw_pairs(batched, captions, schedule, random, device, log)
    kept = captions[torch.arange(len(starts), device=device) % len(captions.lengths)]

    def pairs(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return starts[index].float(), ends[index].float()

    trainer.run("reflow", schedule.reflow_steps, 4e-4, len(starts), kept, pairs)
    trainer.use_average()
    cut_feed_forward(model, width)
    return model.eval()


def _draw_pairs(
    batched: BatchedModel,
    captions: Captions,
    schedule: Schedule,
    random: torch.Generator,
    device: str,
    log: Callable[[str], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and what the model draws from it, bfloat16 [pairs, 64, 64] each."""
    begin = time.perf_counter()
    shape = (schedule.pairs, _IMAGE_TOKENS, 64)
    starts = torch.randn(shape, generator=random, device=device).to(torch.bfloat16)
    ends = torch.empty_like(starts)
    index = torch.arange(schedule.pairs, device=device)
    velocity = _Captured(_velocity(batched, device), device)
    for part in index.split(schedule.batch):
        chosen = captions[part % len(captions.lengths)]
        drawn = _euler(velocity, starts[part].float(), chosen, schedule.pair_steps)
        ends[part] = drawn.to(torch.bfloat16)
    log(f"drew {schedule.pairs} pairs in {time.perf_counter() - begin:.0f} s")
    return starts, ends


class _Trainer:
    def __init__(
        self,
        model: ZImageTransformer2DModel,
        batched: BatchedModel,
        batch: int,
        random: torch.Generator,
        device: str,
        log: Callable[[str], None],
    ) -> None:
        self._batched, self._batch, self._random = batched, batch, random
        self._device, self._log = device, log
        self._parameters = list(model.parameters())
        self._average = [p.detach().clone() for p in self._parameters]

    def run(
        self,
        name: str,
        steps: int,
        rate: float,
        count: int,
        captions: Captions,
        pairs: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Train on pairs of noise and images, which `pairs` returns for indices below `count`."""
        device, random = self._device, self._random
        update = _Update(self._batched, self._parameters, device)
        begin = time.perf_counter()
        losses: list[torch.Tensor] = []
        for step in range(steps):
            index = torch.randint(count, (self._batch,), generator=random, device=device)
            noise, images = pairs(index)
            sigma = torch.rand(self._batch, generator=random, device=device)
            sigma = _SHIFT * sigma / (1 + (_SHIFT - 1) * sigma)
            mixed = images + sigma[:, None, None] * (noise - images)
            now = rate * min(1, (step + 1) / _WARM_UP) * max(0.02, 1 - step / steps)
            losses.append(update(now, mixed, 1 - sigma, captions[index], images - noise))
            with torch.no_grad():  # young averages follow faster
                share = max(1 - _AVERAGE, 1 / (step + 2) if name == "flow" else 0.0)
                torch._foreach_lerp_(self._average, self._parameters, share)
            if len(losses) == _LOGGED or step == steps - 1:
                mean = float(torch.stack(losses).mean())
                losses.clear()
                self._log(
                    f"{name} step {step + 1} of {steps}, {time.perf_counter() - begin:.0f} s, "
                    f"loss {mean:.4f}"
                )

    @torch.no_grad()
    def use_average(self) -> None:
        """Continue from the average of the weights."""
        torch._foreach_copy_(self._parameters, self._average)


class _Update:
    """One step of AdamW."""

    def __init__(
        self, batched: BatchedModel, parameters: list[torch.nn.Parameter], device: str
    ) -> None:
        self._batched, self._parameters, self._device = batched, parameters, device
        self._rate = torch.zeros((), device=device)
        self._optimizer = torch.optim.AdamW(
            parameters,
            lr=self._rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
            capturable=device == "cuda",
        )
        self._captured = _Captured(self._step, device)

    def __call__(
        self,
        rate: float,
        mixed: torch.Tensor,
        t: torch.Tensor,
        captions: Captions,
        target: torch.Tensor,
    ) -> torch.Tensor:
        """Update the weights at a learning rate, and return the loss."""
        self._rate.fill_(rate)
        return self._captured(mixed, t, captions.features, captions.lengths, target).clone()

    def _step(
        self,
        mixed: torch.Tensor,
        t: torch.Tensor,
        features: torch.Tensor,
        lengths: torch.Tensor,
        target: torch.Tensor,
    ) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=True)  # a graph's own memory holds the gradients
        with torch.autocast(self._device, torch.bfloat16):
            velocity = self._batched(mixed, t, Captions(features, lengths))
        loss = F.mse_loss(velocity.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return loss.detach()
