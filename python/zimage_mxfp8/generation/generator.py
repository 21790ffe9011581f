"""Images from a prompt: text encoder, transformer and VAE, one after another."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline
from diffusers.image_processor import VaeImageProcessor

from .. import _core
from ..checkpoint import hub
from ..checks import file_or_folder, whole_number
from ..errors import CudaError, GenerationError, RankError, UsageError
from ..printing.progress import shown, stage_bar
from ..streaming.jobs import Progress
from ..system.device_notes import report_line
from ..system.devices import core_index, memory_for
from ..transformer.compute import Compute, choose
from ..transformer.control import ZImageControlNet
from ..transformer.floating_dtype import as_dtype, default_dtype, name_of
from ..transformer.model import ZImageTransformer
from ..transformer.ranks.devices import rank_devices
from .components import MAX_TOKENS, VAE, TextEncoder, load_scheduler
from .controlled import ControlledTransformer
from .folder import open_model_folder
from .images import open_image
from .limits import PIXELS_PER_TOKEN
from .loras import LoraCache
from .parts import open_parts
from .preview import PreviewCallback, Previews
from .settings import GenerationSettings
from .steps import StepCallback, Steps

if TYPE_CHECKING:
    from PIL.Image import Image

Part = Literal["text encoder", "transformer", "ControlNet", "VAE"]
Stage = Literal[Part, "encoding", "denoising", "decoding"]


@dataclass(frozen=True)
class _Dtypes:
    """The dtype of each part."""

    transformer: torch.dtype
    text_encoder: torch.dtype
    vae: torch.dtype


_DTYPES: dict[str, _Dtypes] = {
    "bfloat16": _Dtypes(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    # Text encoder and VAE are other libraries' code, which does not scale rows for float16.
    "float16": _Dtypes(torch.float16, torch.bfloat16, torch.float32),
    "float32": _Dtypes(torch.float32, torch.float32, torch.float32),
}


@dataclass(frozen=True)
class GenerationProgress:
    """Progress of a generation, given to callbacks.

    Attributes:
        stage: the name of a part while it is loaded, else the work in progress.
        done: finished bytes of "transformer" and "ControlNet", steps of
            "denoising", images of "decoding", 0 or 1 for other stages.
        total: total of the same unit.
        seconds: time of the last step of "denoising", else 0.
    """

    stage: Stage
    done: int
    total: int
    seconds: float = 0.0


GenerationCallback = Callable[[GenerationProgress], object]


@dataclass(frozen=True)
class Generation:
    """Images, with the settings that made them.

    Attributes:
        images: PIL images.
        settings: with every open value filled in.
        steps: number of forward passes.
        step_seconds: median time of a step.
        compute: compute mode of the transformer.
        device: the device that it ran on.
        dtype: name of the dtype, see `ZImageGenerator`.
        model: name of the model's folder or, from the Hugging Face cache, of its repository.
        transformer: name of the transformer's file or folder.
        controlnet: name of the ControlNet's file; empty without one.
        warnings: sentences for the user.
    """

    images: tuple[Image, ...]
    settings: GenerationSettings
    steps: int
    step_seconds: float
    compute: Compute
    device: str
    dtype: str
    model: str
    transformer: str
    controlnet: str
    warnings: tuple[str, ...]

    def seed(self, i: int) -> int:
        """Return the seed that makes image i alone."""
        assert self.settings.seed is not None  # resolved
        return self.settings.seed + i

    def metadata(self, i: int) -> dict[str, Any]:
        """Return all settings of image i as JSON-compatible values; of paths only file names.

        An image that was given as such, without a file, is named "in memory".
        """
        settings = self.settings
        more: dict[str, Any] = {}
        if settings.mask_image is not None:
            more = {"mask_image": _name_of(settings.mask_image)}
        if settings.control_image is not None:
            more |= {
                "controlnet": self.controlnet,
                "control_image": _name_of(settings.control_image),
                "control_strength": settings.control_strength,
                "control_start": settings.control_start,
                "control_end": settings.control_end,
            }
        return {
            "prompt": settings.prompt,
            "negative_prompt": settings.negative_prompt,
            "seed": self.seed(i),
            "steps": settings.steps,
            "width": settings.width,
            "height": settings.height,
            "guidance": settings.guidance,
            "init_image": _name_of(settings.init_image),
            "strength": settings.strength,
            "loras": [{"name": file.name, "weight": weight} for file, weight in settings.loras],
            "model": self.model,
            "transformer": self.transformer,
            "compute": self.compute,
            "dtype": self.dtype,
            "version": _core.__version__,
            **more,
        }


class ZImageGenerator:
    """A generator of images, from the parts of a diffusers folder and this package's transformer.

    Threads may share a generator; with `offload` they take turns.

    Args:
        model_dir: the diffusers folder, or the name of one on the Hugging Face hub that is in the
            local cache. Its own transformer is only needed without `transformer`.
        transformer: an MXFP8 or plain file or folder, or the name of one on the hub, see
            `ZImageTransformer.from_pretrained`.
        controlnet: an MXFP8 or plain file of a ControlNet, or the name of one on the hub; for
            settings with a control image.
        device: by default the current CUDA device if torch has one, else the CPU.
        compute: the compute mode, see `ZImageTransformer.from_checkpoint`.
        dtype: see `ZImageTransformer.from_checkpoint`. With "float16" the text encoder is in
            bfloat16 and the VAE in float32; otherwise all parts have the same dtype.
        devices: instead of `device`; the transformer shares each image among these, see
            `ZImageTransformer.from_checkpoint`, and the first one has the other parts.
        offload: load a part when its turn comes, and free it afterwards: memory holds the largest
            part and its activations. Otherwise all parts are loaded now, and stay.
        download: fetch files that the cache lacks from the hub; without it there is no network
            access.
        progress: called while the parts are loaded; True draws bars on a terminal.

    Raises:
        CheckpointError: a part is missing, damaged, or does not fit the others; the sentence names
            it.
        UsageError: not a path, no such device, mode or dtype, or they contradict each other.
        UnsupportedError: the device does not have the mode.
        CudaError: the device has too little memory.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        transformer: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        compute: str = "auto",
        dtype: str | torch.dtype | None = None,
        *,
        controlnet: str | os.PathLike[str] | None = None,
        devices: Sequence[str | torch.device] | None = None,
        offload: bool = False,
        download: bool = False,
        progress: GenerationCallback | bool | None = None,
    ) -> None:
        given = None if dtype is None else as_dtype(dtype)
        file_or_folder("model_dir", model_dir)  # for its error
        own = () if transformer is not None else (hub.TRANSFORMER,)
        folder = hub.resolve(model_dir, (*hub.COMPONENTS, *own), download=download)
        open_model_folder(folder)  # before anything else is downloaded
        file = control_file = None
        if transformer is not None:
            file_or_folder("transformer", transformer)
            file = hub.resolve(transformer, (hub.TRANSFORMER,), download=download)
        if controlnet is not None:
            file_or_folder("controlnet", controlnet)
            control_file = hub.resolve(controlnet, (), download=download)
        parts = open_parts(folder, file, control_file, compute)
        self._folder, self._file, self._control_file = parts.folder, parts.file, parts.control_file
        self._devices = rank_devices(device, devices)
        self._device = self._devices[0]
        self._dtype = name_of(given or default_dtype(self._device))
        index = core_index(self._device)
        self._compute = choose(compute, index, parts.transformer.weights)
        if parts.controlnet is not None:
            mode = parts.control_compute
            self._control_compute = choose(mode, index, parts.controlnet.weights)
        report_line(self._device, device if devices is None else self._device)
        self._scheduler = load_scheduler(self._folder)
        self._offload = offload
        # Loading a part changes torch's default dtype in all threads; and with a part per thread
        # memory would hold more than one.
        self._turn = threading.RLock() if offload else nullcontext()
        # Weights of adapters belong to the transformer, which one image at a time uses.
        self._adapters = threading.Lock()
        self._loras = LoraCache()
        self._kept: dict[Part, Any] = {}
        self._lost_transformer = False
        if not offload:
            with shown(progress, stage_bar) as callback:
                for part in get_args(Part):
                    if part == "ControlNet" and not self._control_file:
                        continue
                    self._part(part, callback)

    @property
    def dtype(self) -> str:
        """The name of the dtype, see the class."""
        return self._dtype

    @contextmanager
    def holding(
        self, *parts: Part, progress: GenerationCallback | bool | None = None
    ) -> Iterator[None]:
        """Load parts now, and keep them within the block, with `offload` too.

        For several generations in a row, each of which would load them again.

        Args:
            parts: "text encoder", "transformer" or "VAE".
            progress: called while they are loaded; True draws bars on a terminal.

        Raises:
            CheckpointError: a part cannot be read.
            CudaError, UnsupportedError: too little memory.
        """
        with self._turn:
            added = [part for part in parts if part not in self._kept]
            try:
                with shown(progress, stage_bar) as callback:
                    for part in added:
                        self._kept[part] = self._part(part, callback)
                yield
            finally:
                for part in added:
                    self._kept.pop(part, None)
                self._free()

    def encode(
        self,
        settings: GenerationSettings,
        progress: GenerationCallback | bool | None = None,
    ) -> list[torch.Tensor]:
        """Return the caption features that `generate` takes, of the same prompts and guidance.

        Args:
            settings: with the prompts.
            progress: as for `generate`.

        Returns:
            [tokens, features] of the prompt and, with guidance, of the negative one.

        Raises:
            CheckpointError: with offloading, the text encoder cannot be read.
            CudaError, UnsupportedError: too little memory.
        """
        with self._turn, shown(progress, stage_bar) as callback:
            captions = self._encode(settings, callback or (lambda _: None))
            self._free()
        return captions

    def generate(
        self,
        settings: GenerationSettings,
        progress: GenerationCallback | bool | None = None,
        *,
        captions: Sequence[torch.Tensor] | None = None,
        preview: PreviewCallback | None = None,
        preview_every: int = 1,
        on_step: StepCallback | None = None,
    ) -> Generation:
        """Make images.

        The same seed gives the same noise on every device; only rounding differs. An image of a
        batch equals that of its own seed alone, again except for rounding.

        Args:
            settings: the settings of the images.
            progress: called as stages begin and advance, and after every step; True draws bars on a
                terminal.
            captions: what `encode` returned for these prompts, so that the text encoder need not
                run again.
            preview: called with the number of finished steps and a small estimate of each image,
                which the VAE decodes. It does not change the result.
            preview_every: steps from one preview to the next; no preview follows the first and the
                last step.
            on_step: called after each step with the number of finished steps and the latents,
                float32 [batch, 16, height / 8, width / 8] on the device.

        Raises:
            UsageError: these are no settings, `preview_every` is not a whole number from 1 on, the
                number of captions does not go with the guidance, or the mask has another size than
                the init image.
            CheckpointError: an image or an adapter cannot be read, an adapter does not fit, or,
                with offloading, a part cannot be read.
            GenerationError: an image became NaN or infinite; the sentence says at which step.
            RankError: with `devices`, the process of one has ended; the next call starts anew.
            CudaError, UnsupportedError: too little memory.
        """
        if not isinstance(settings, GenerationSettings):
            raise UsageError(
                "settings",
                f"must be GenerationSettings, not {repr(settings)[:80]}",
                'give `GenerationSettings("a fox")`, for example',
            )
        if whole_number("preview_every", preview_every) < 1:
            raise UsageError("preview_every", f"must be 1 or more, not {preview_every}")
        needed = 2 if settings.guidance else 1
        if captions is not None and len(captions) != needed:
            raise UsageError(
                "captions",
                f"must be {needed}, not {len(captions)}",
                "take the result of ZImageGenerator.encode",
            )
        image = None if settings.init_image is None else open_image(settings.init_image)
        mask = _open_mask(settings, image)
        control_image = self._open_control_image(settings)
        shown_size = image or control_image
        settings = settings.resolved(shown_size.size if shown_size else None)
        _check_shape(settings, control_image)
        with self._turn, shown(progress, stage_bar) as callback:
            report = callback or (lambda _: None)
            features = self._encode(settings, report) if captions is None else list(captions)
            self._free()
            control = self._encode_control(settings, control_image, report)
            self._free()
            latents, steps, notes = self._denoise(
                settings,
                image,
                mask,
                control,
                features,
                report,
                on_step,
                None if preview is None else lambda vae: Previews(vae, preview_every, preview),
            )
            self._free()
            pixels = self._decode(latents, report)
            self._free()
        # The device is read once per generation.
        finite = [torch.stack([c.isfinite().all() for c in features]).all().expand(settings.batch)]
        finite += [*steps.finite, torch.stack([image.isfinite().all() for image in pixels])]
        self._check(settings, torch.stack(finite).cpu())
        return Generation(
            images=tuple(
                VaeImageProcessor(vae_scale_factor=PIXELS_PER_TOKEN).postprocess(image)[0]
                for image in pixels
            ),
            settings=settings,
            steps=len(steps.finite),
            step_seconds=median(steps.seconds()),
            compute=self._compute,
            device=str(self._device),
            dtype=self._dtype,
            model=hub.name_of(self._folder.path),
            transformer=self._file.name,
            controlnet=self._control_file.name if self._control_file else "",
            warnings=(*_warnings(features), *notes),
        )

    # ---- Parts

    def _part(self, name: Part, progress: GenerationCallback | None) -> Any:
        """Return a part, loaded if necessary; with offloading only the caller refers to it."""
        if name in self._kept:
            return self._kept[name]
        if name == "transformer" and self._lost_transformer:
            self._collect()  # its weights, which references in a circle keep
            self._lost_transformer = False
        report = progress or (lambda _: None)
        dtypes = _DTYPES[self._dtype]
        report(GenerationProgress(name, 0, 1))
        with self._memory_for(f"the {name}"):
            if name == "text encoder":
                part: Any = TextEncoder(self._folder, self._device, dtypes.text_encoder)
            elif name == "VAE":
                part = VAE(self._folder, self._device, dtypes.vae)
            elif name == "ControlNet":
                assert self._control_file is not None
                part = ZImageControlNet.from_checkpoint(
                    self._control_file,
                    self._device,
                    self._control_compute,
                    dtypes.transformer,
                    progress=lambda p: report(_bytes_read(p, "ControlNet")),
                )
            else:
                part = ZImageTransformer.from_checkpoint(
                    self._file,
                    None,
                    self._compute,
                    dtypes.transformer,
                    devices=self._devices,
                    progress=lambda p: report(_bytes_read(p, "transformer")),
                )
        if not self._offload:
            self._kept[name] = part
        return part

    def _free(self) -> None:
        """Free the memory of parts without references."""
        if self._offload:
            self._collect()

    def _collect(self) -> None:
        gc.collect()  # the libraries' objects refer to one another
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _memory_for(self, what: str) -> Iterator[None]:
        more = [] if self._offload else ["`offload=True` needs less"]
        with memory_for(what, self._device, "; ".join(["use a smaller size or batch", *more])):
            try:
                yield
            except CudaError as error:
                hints = filter(None, [error.hint, *more])
                raise CudaError(error.problem, "; ".join(hints)) from None

    # ---- Stages. The parts that a stage loads are freed with its local variables.

    def _encode(
        self, settings: GenerationSettings, report: GenerationCallback
    ) -> list[torch.Tensor]:
        """Return caption features of the prompt, and with guidance of the negative one."""
        encoder: TextEncoder = self._part("text encoder", report)
        prompts = [settings.prompt]
        if settings.guidance:
            prompts.append(settings.negative_prompt or "")
        report(GenerationProgress("encoding", 0, 1))
        with self._memory_for("the prompt"):
            captions = [encoder.encode(prompt) for prompt in prompts]
        report(GenerationProgress("encoding", 1, 1))
        return captions

    def _open_control_image(self, settings: GenerationSettings) -> Image | None:
        if settings.control_image is None:
            return None
        if self._control_file is None:
            raise UsageError(
                "control_image", "has no effect without a ControlNet", "add `controlnet` or drop it"
            )
        return open_image(settings.control_image, "control image")

    def _encode_control(
        self, settings: GenerationSettings, image: Image | None, report: GenerationCallback
    ) -> torch.Tensor | None:
        """Latent of the control image, [1, 16, height / 8, width / 8]."""
        if image is None:
            return None
        vae: VAE = self._part("VAE", report)
        processor = VaeImageProcessor(vae_scale_factor=PIXELS_PER_TOKEN)
        assert settings.height and settings.width  # resolved
        with self._memory_for("the control image"):
            return vae.encode(processor.preprocess(image, settings.height, settings.width))

    def _denoise(
        self,
        settings: GenerationSettings,
        image: Image | None,
        mask: Image | None,
        control: torch.Tensor | None,
        captions: list[torch.Tensor],
        report: GenerationCallback,
        on_step: StepCallback | None,
        make_previews: Callable[[VAE], Previews] | None,
    ) -> tuple[torch.Tensor, Steps, list[str]]:
        """Return latents [batch, 16, height / 8, width / 8], the steps, and notes on adapters."""
        assert settings.seed is not None and settings.height and settings.width  # resolved
        batch = settings.batch
        # Diffusers' pipelines give the VAE images in the dtype of captions.
        captions = [caption.to(_DTYPES[self._dtype].vae) for caption in captions]
        transformer: ZImageTransformer = self._part("transformer", report)
        model: ZImageTransformer | ControlledTransformer = transformer
        if control is not None:
            net = self._part("ControlNet", report)
            model = ControlledTransformer(transformer, net, control, settings)
        parts = {
            "transformer": model,
            # The scheduler counts steps: a new one per call, so that threads may share a generator.
            "scheduler": type(self._scheduler).from_config(self._scheduler.config),
            "text_encoder": None,
            "tokenizer": None,
        }
        vae: VAE | None = self._part("VAE", report) if image or make_previews else None
        options: dict[str, Any] = {}
        if image is None:
            pipeline = ZImagePipeline(vae=None, **parts)
        else:
            assert vae is not None
            kind = ZImageImg2ImgPipeline if mask is None else ZImageInpaintPipeline
            pipeline = kind(vae=vae.model, **parts)
            resized = pipeline.image_processor.resize(image, settings.height, settings.width)
            # One per image: otherwise all images get the first one's random numbers.
            options = {"image": [resized] * batch, "strength": settings.strength}
            if mask is not None:
                options["mask_image"] = mask
        if isinstance(model, ControlledTransformer):
            model.count_steps = lambda: pipeline.num_timesteps
        pipeline.set_progress_bar_config(disable=True)
        previews = make_previews(vae) if make_previews and vae else None
        steps = Steps(
            self._device,
            lambda *state: report(GenerationProgress("denoising", *state)),
            previews,
            on_step,
        )
        with (
            self._adapters,
            self._memory_for(f"{batch} x {settings.width} x {settings.height} pixels"),
            self._loaded_again_after_loss(transformer),
        ):
            notes = self._loras.use(transformer, settings.loras)
            (latents,) = pipeline(
                prompt_embeds=captions[:1] * batch,
                negative_prompt_embeds=captions[1:] * batch or None,
                height=settings.height,
                width=settings.width,
                num_inference_steps=settings.steps,
                # Diffusers 0.42 computes these by default. In older versions the last step was at 0
                # and skipped.
                sigmas=[1 - i / settings.steps for i in range(settings.steps)],
                guidance_scale=settings.guidance,
                # On the CPU, for the same noise on every device.
                generator=[torch.Generator().manual_seed(settings.seed + i) for i in range(batch)],
                output_type="latent",
                return_dict=False,
                callback_on_step_end=steps,
                **options,
            )
            steps.finish()
            transformer.check_ranks()  # the last step may have lost one
        return latents, steps, notes

    @contextmanager
    def _loaded_again_after_loss(self, transformer: ZImageTransformer) -> Iterator[None]:
        """Drop a transformer on several devices that has stopped; the next image loads it."""
        try:
            yield
        except BaseException:
            try:
                transformer.check_ranks()
            except RankError:
                self._kept.pop("transformer", None)
                self._lost_transformer = True
            raise

    def _decode(self, latents: torch.Tensor, report: GenerationCallback) -> list[torch.Tensor]:
        """Decode images [1, 3, height, width], one by one to bound the memory."""
        vae: VAE = self._part("VAE", report)
        pixels: list[torch.Tensor] = []
        report(GenerationProgress("decoding", 0, len(latents)))
        with self._memory_for("decoding an image"):
            for latent in latents.split(1):
                pixels.append(vae.decode(latent))
                report(GenerationProgress("decoding", len(pixels), len(latents)))
        return pixels

    def _check(self, settings: GenerationSettings, finite: torch.Tensor) -> None:
        """Raise if an image is not finite; [captions, steps..., pixels; batch] of flags."""
        if finite.all():
            return
        assert settings.seed is not None
        row, item = (~finite).nonzero()[0].tolist()
        last = len(finite) - 1
        wider = {
            "bfloat16": ['`dtype="float32"`'],
            "float16": ['`dtype="bfloat16"`'],  # it has the range of float32
            "float32": [],
        }[self._dtype]
        remedy = "".join(f", or use {setting}" for setting in wider)
        if row == 0:
            where = "the text encoder gave NaN or Inf for the prompt"
            place = self._folder.path / "text_encoder"
            raise GenerationError(where, 0, f"check {place}{remedy}")
        added = ["its LoRAs"] if settings.loras else []
        added += ["its control image"] if settings.control_image is not None else []
        remedies = [f"try it without {' and '.join(added)}"] if added else []
        if row == last:
            where = "the VAE turned finite latents into NaN or Inf"
            remedies.append(f"check {self._folder.path / 'vae'}{remedy}")
            raise GenerationError(where, None, ", or ".join(remedies))
        exact = [] if self._compute == "weight-only" else ['`compute="weight-only"`']
        remedies.append(f"run zimage-mxfp8 validate {self._file} to check the file")
        remedies += [f"try {setting}" for setting in exact + wider]
        raise GenerationError(
            f"the image of seed {settings.seed + item} became NaN or Inf in step {row} of "
            f"{last - 1} (compute {self._compute}, {self._dtype})",
            row,
            ", or ".join(remedies),
        )


def _bytes_read(progress: Progress, stage: Stage) -> GenerationProgress:
    return GenerationProgress(stage, progress.done, progress.total)


def _name_of(image: Path | Image | None) -> str | None:
    return image.name if isinstance(image, Path) else None if image is None else "in memory"


def _open_mask(settings: GenerationSettings, image: Image | None) -> Image | None:
    """Return the mask of an init image."""
    if settings.mask_image is None or image is None:
        return None
    mask = open_image(settings.mask_image, "mask image")
    if mask.size != image.size:
        raise UsageError(
            "mask_image",
            f"has {mask.width} x {mask.height} pixels, and the init image {image.width} x "
            f"{image.height}",
            "give both the same size",
        )
    return mask


def _check_shape(settings: GenerationSettings, control_image: Image | None) -> None:
    """Raise if a control image would be distorted."""
    if control_image is None:
        return
    width, height = control_image.size
    assert settings.height and settings.width  # resolved
    if abs(settings.height * width / height - settings.width) >= PIXELS_PER_TOKEN:
        raise UsageError(
            "control_image",
            f"has {width} x {height} pixels, and the image {settings.width} x {settings.height}, "
            "which is another shape",
            "scale or crop it, or leave out `width` and `height`",
        )


def _warnings(captions: list[torch.Tensor]) -> Iterator[str]:
    if any(len(caption) >= MAX_TOKENS for caption in captions):
        yield (
            f"a prompt fills the {MAX_TOKENS} tokens that the text encoder takes; text after "
            "them has no effect"
        )
