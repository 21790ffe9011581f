"""From a prompt to images: text encoder, transformer and VAE, one after another."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from diffusers.image_processor import VaeImageProcessor

from .. import _core
from ..checkpoint import hub
from ..checks import file_or_folder, whole_number
from ..errors import CheckpointError, CudaError, GenerationError, UsageError
from ..printing.progress import shown, stage_bar
from ..streaming.jobs import Progress
from ..system.device_notes import report_line
from ..system.devices import core_index, memory_for, torch_device
from ..transformer.compute import Compute, choose
from ..transformer.control import ZImageControlNet
from ..transformer.model import ZImageTransformer
from ..transformer.weights import ModelFile, open_control, open_model
from ..zimage.config import ZImageConfig
from .components import MAX_TOKENS, VAE, TextEncoder, load_scheduler
from .controlled import ControlledTransformer
from .folder import open_model_folder
from .images import open_image
from .preview import PreviewCallback, Previews
from .settings import PIXELS_PER_TOKEN, GenerationSettings

if TYPE_CHECKING:
    from PIL.Image import Image

Stage = Literal[
    "text encoder", "transformer", "ControlNet", "VAE", "encoding", "denoising", "decoding"
]
_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class GenerationProgress:
    """State of a generation, given to progress callbacks.

    Attributes:
        stage: what goes on: the name of a part while it is loaded, else the work.
        done: what is finished of the stage: bytes of "transformer" and "ControlNet", steps of
            "denoising", images of "decoding", 0 or 1 of the others.
        total: of how many.
        seconds: time of the last step of "denoising", else 0.
    """

    stage: Stage
    done: int
    total: int
    seconds: float = 0.0


GenerationCallback = Callable[[GenerationProgress], object]


@dataclass(frozen=True)
class Generation:
    """Images, and how they were made.

    Attributes:
        images: PIL images.
        settings: with everything that was left open filled in.
        steps: forward passes that were made.
        step_seconds: median time of a step.
        compute: compute mode of the transformer.
        device: where it ran.
        dtype: of everything that is not 8 bits wide.
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
        """Return what makes image i again, as JSON-compatible values; names of files only."""
        settings = self.settings
        control: dict[str, Any] = {}
        if settings.control_image is not None:
            control = {
                "controlnet": self.controlnet,
                "control_image": settings.control_image.name,
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
            "init_image": settings.init_image.name if settings.init_image else None,
            "strength": settings.strength,
            "model": self.model,
            "transformer": self.transformer,
            "compute": self.compute,
            "dtype": self.dtype,
            "version": _core.__version__,
            **control,
        }


class ZImageGenerator:
    """Makes images with the parts of a diffusers folder and a transformer of this package.

    Threads may share one; with `offload` they take turns.

    Args:
        model_dir: the diffusers folder, or the name of one on the Hugging Face hub that is in the
            local cache. Its own transformer is needed only without `transformer`.
        transformer: an MXFP8 or plain file or folder, or the name of one on the hub, see
            `ZImageTransformer.from_pretrained`.
        controlnet: an MXFP8 or plain file of a ControlNet, or the name of one on the hub; for
            settings with a control image.
        device: by default the current CUDA device if torch has one, else the CPU.
        compute: the compute mode, see `ZImageTransformer.from_checkpoint`.
        dtype: "bfloat16" or "float32", of everything that is not 8 bits wide.
        offload: load a part when its turn comes, and free it afterwards: memory holds the largest
            part and what it works on. Otherwise all parts are loaded now, and stay.
        download: fetch from the hub what the cache lacks; without it nothing is asked for on the
            network.
        progress: called while the parts are loaded; True draws bars on a terminal.

    Raises:
        CheckpointError: a part is missing, damaged, or does not go with the others; the sentence
            names it.
        UsageError: not a path, no such device, mode or dtype, or they do not go together.
        UnsupportedError: the device does not have the mode.
        CudaError: the device has too little memory.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        transformer: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        compute: str = "auto",
        dtype: str = "bfloat16",
        *,
        controlnet: str | os.PathLike[str] | None = None,
        offload: bool = False,
        download: bool = False,
        progress: GenerationCallback | bool | None = None,
    ) -> None:
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise UsageError("dtype", f"must be {' or '.join(_DTYPES)}, not {repr(dtype)[:80]}")
        self._dtype = dtype
        file_or_folder("model_dir", model_dir)  # for its error
        parts = hub.COMPONENTS if transformer is not None else (*hub.COMPONENTS, hub.TRANSFORMER)
        self._folder = open_model_folder(hub.resolve(model_dir, parts, download=download))
        if transformer is None and not self._folder.transformer.is_dir():
            raise CheckpointError(
                f"{model_dir} has no transformer/",
                "name a file with `transformer`, or download the model again",
            )
        if transformer is None:
            self._file = self._folder.transformer
        else:
            file_or_folder("transformer", transformer)
            self._file = hub.resolve(transformer, (hub.TRANSFORMER,), download=download)
        self._device = torch_device(device)
        headers = open_model(self._file)
        self._folder.check_captions_fit(self._file, headers.config.cap_feat_dim)
        self._compute = choose(compute, core_index(self._device), bool(headers.layers))
        self._control_file: Path | None = None
        if controlnet is not None:
            file_or_folder("controlnet", controlnet)
            self._control_file = hub.resolve(controlnet, (), download=download)
            self._control_compute = self._check_controlnet(self._control_file, headers, compute)
        report_line(self._device, device)
        self._scheduler = load_scheduler(self._folder)
        self._offload = offload
        # While a part is loaded, torch's default dtype is another, in all threads; nor would memory
        # hold just one part if every thread had its own.
        self._turn = threading.RLock() if offload else nullcontext()
        self._kept: dict[Stage, Any] = {}
        if not offload:
            with shown(progress, stage_bar) as callback:
                parts_now: list[Stage] = ["text encoder", "transformer", "VAE"]
                for part in parts_now + (["ControlNet"] if self._control_file else []):
                    self._part(part, callback)

    def generate(
        self,
        settings: GenerationSettings,
        progress: GenerationCallback | bool | None = None,
        *,
        preview: PreviewCallback | None = None,
        preview_every: int = 1,
    ) -> Generation:
        """Make images.

        The same seed gives the same noise on every device; what differs is rounding. An image of
        a batch is that of its own seed alone, again but for rounding.

        Args:
            settings: what to make.
            progress: called as stages begin and advance, and after every step; True draws bars on a
                terminal.
            preview: called with the number of steps that are done and a small image of each that is
                being made, a guess that the VAE decodes. It does not change the result.
            preview_every: steps from one preview to the next; there is none after the first step
                and after the last one.

        Raises:
            UsageError: `preview_every` is no whole number from 1 on.
            CheckpointError: the init image cannot be read, or, with offloading, a part.
            GenerationError: an image became NaN or infinite; the sentence says at which step.
            CudaError, UnsupportedError: too little memory.
        """
        if whole_number("preview_every", preview_every) < 1:
            raise UsageError("preview_every", f"must be 1 or more, not {preview_every}")
        image = None if settings.init_image is None else open_image(settings.init_image)
        control_image = self._open_control_image(settings)
        shown_size = image or control_image
        settings = settings.resolved(shown_size.size if shown_size else None)
        _check_shape(settings, control_image)
        with self._turn, shown(progress, stage_bar) as callback:
            report = callback or (lambda _: None)
            captions = self._encode(settings, report)
            self._free()
            control = self._encode_control(settings, control_image, report)
            self._free()
            latents, steps = self._denoise(
                settings,
                image,
                control,
                captions,
                report,
                None if preview is None else lambda vae: Previews(vae, preview_every, preview),
            )
            self._free()
            pixels = self._decode(latents, report)
            self._free()
        # One look at the device for the whole generation.
        finite = [torch.stack([c.isfinite().all() for c in captions]).all().expand(settings.batch)]
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
            warnings=tuple(_warnings(captions)),
        )

    # ---- Parts

    def _part(self, name: Stage, progress: GenerationCallback | None) -> Any:
        """A part, loaded if it is not there; with offloading the caller's is the only reference."""
        if name in self._kept:
            return self._kept[name]
        report = progress or (lambda _: None)
        dtype = _DTYPES[self._dtype]
        report(GenerationProgress(name, 0, 1))
        with self._memory_for(f"the {name}"):
            if name == "text encoder":
                part: Any = TextEncoder(self._folder, self._device, dtype)
            elif name == "VAE":
                part = VAE(self._folder, self._device, dtype)
            elif name == "ControlNet":
                assert self._control_file is not None
                part = ZImageControlNet.from_checkpoint(
                    self._control_file,
                    self._device,
                    self._control_compute,
                    dtype,
                    progress=lambda p: report(_bytes_read(p, "ControlNet")),
                )
            else:
                part = ZImageTransformer.from_checkpoint(
                    self._file,
                    self._device,
                    self._compute,
                    dtype,
                    progress=lambda p: report(_bytes_read(p, "transformer")),
                )
        if not self._offload:
            self._kept[name] = part
        return part

    def _free(self) -> None:
        """Give back the memory of parts that nothing refers to any more."""
        if self._offload:
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

    # ---- Stages. What each loads goes with its locals.

    def _encode(
        self, settings: GenerationSettings, report: GenerationCallback
    ) -> list[torch.Tensor]:
        """Caption features of the prompt, and of the negative one where there is guidance."""
        encoder: TextEncoder = self._part("text encoder", report)
        prompts = [settings.prompt]
        if settings.guidance:
            prompts.append(settings.negative_prompt or "")
        report(GenerationProgress("encoding", 0, 1))
        with self._memory_for("the prompt"):
            captions = [encoder.encode(prompt) for prompt in prompts]
        report(GenerationProgress("encoding", 1, 1))
        return captions

    def _check_controlnet(
        self, file: Path, model: ModelFile[ZImageConfig], compute: str
    ) -> Compute:
        """Return the compute mode of a ControlNet.

        Raises:
            CheckpointError: it is none, or for another model.
        """
        headers = open_control(file)
        if problem := headers.config.misfit(model.config):
            raise CheckpointError(
                f"the ControlNet {file} does not fit the transformer {self._file}: {problem}"
            )
        # A mode for MXFP8 is meant for the files that have such layers.
        mode = compute if headers.layers else "auto"
        return choose(mode, core_index(self._device), bool(headers.layers))

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
        control: torch.Tensor | None,
        captions: list[torch.Tensor],
        report: GenerationCallback,
        make_previews: Callable[[VAE], Previews] | None,
    ) -> tuple[torch.Tensor, _Steps]:
        """Latents [batch, 16, height / 8, width / 8]."""
        assert settings.seed is not None and settings.height and settings.width  # resolved
        batch = settings.batch
        transformer = self._part("transformer", report)
        if control is not None:
            net = self._part("ControlNet", report)
            transformer = ControlledTransformer(transformer, net, control, settings)
        parts = {
            "transformer": transformer,
            # It counts the steps: a new one, so that threads may use one generator.
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
            pipeline = ZImageImg2ImgPipeline(vae=vae.model, **parts)
            resized = pipeline.image_processor.resize(image, settings.height, settings.width)
            # One for each image: otherwise the first one's random numbers serve all of them.
            options = {"image": [resized] * batch, "strength": settings.strength}
        if isinstance(transformer, ControlledTransformer):
            transformer.count_steps = lambda: pipeline.num_timesteps
        pipeline.set_progress_bar_config(disable=True)
        previews = make_previews(vae) if make_previews and vae else None
        steps = _Steps(self._device, report, previews)
        with self._memory_for(f"{batch} x {settings.width} x {settings.height} pixels"):
            (latents,) = pipeline(
                prompt_embeds=captions[:1] * batch,
                negative_prompt_embeds=captions[1:] * batch or None,
                height=settings.height,
                width=settings.width,
                num_inference_steps=settings.steps,
                # As diffusers 0.42 has them by itself. Before, its last step was at 0 and skipped.
                sigmas=[1 - i / settings.steps for i in range(settings.steps)],
                guidance_scale=settings.guidance,
                # On the CPU, for the same noise whatever the device.
                generator=[torch.Generator().manual_seed(settings.seed + i) for i in range(batch)],
                output_type="latent",
                return_dict=False,
                callback_on_step_end=steps,
                **options,
            )
            steps.finish()
        return latents, steps

    def _decode(self, latents: torch.Tensor, report: GenerationCallback) -> list[torch.Tensor]:
        """Images [1, 3, height, width], decoded one by one to bound the memory."""
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
        wider = [] if self._dtype == "float32" else ['`dtype="float32"`']
        remedy = "".join(f", or use {setting}" for setting in wider)
        if row == 0:
            where = "the text encoder gave NaN or Inf for the prompt"
            place = self._folder.path / "text_encoder"
            raise GenerationError(where, 0, f"check {place}{remedy}")
        if row == last:
            where = "the VAE turned sound latents into NaN or Inf"
            raise GenerationError(where, None, f"check {self._folder.path / 'vae'}{remedy}")
        exact = [] if self._compute == "weight-only" else ['`compute="weight-only"`']
        sounder = exact + wider
        remedy = f", and {' or '.join(sounder)} may get around it" if sounder else ""
        raise GenerationError(
            f"the image of seed {settings.seed + item} became NaN or Inf in step {row} of "
            f"{last - 1} (compute {self._compute}, {self._dtype})",
            row,
            f"zimage-mxfp8 validate {self._file} tells whether the file is sound{remedy}",
        )


class _Steps:
    """Watches the steps of a pipeline and keeps the device busy meanwhile.

    Attributes:
        finite: for each step, which images were finite after it: flags [batch] on the device.
    """

    def __init__(
        self, device: torch.device, report: GenerationCallback, previews: Previews | None
    ) -> None:
        self.finite: list[torch.Tensor] = []
        self._previews = previews
        self._device = device
        self._report = report
        self._total = 0
        # When steps begin and end: events of CUDA, or seconds.
        self._begins = [self._now()]
        self._ends: list[Any] = []

    def __call__(
        self, pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Diffusers' `callback_on_step_end`: a step is over, or on its way on a CUDA device."""
        self._total = pipeline.num_timesteps
        self.finite.append(tensors["latents"].isfinite().flatten(1).all(1))
        self._ends.append(self._now())
        if self._device.type != "cuda":
            self._tell(len(self.finite))
        elif len(self.finite) > 1:
            # Of the step before, so that this one is there to be run in the meantime.
            self._ends[-2].synchronize()
            self._tell(len(self.finite) - 1)
        if self._previews is not None:
            done = len(self.finite)
            self._previews.after_step(done, self._total, pipeline.scheduler, tensors["latents"])
        self._begins.append(self._now())
        return {}

    def finish(self) -> None:
        """Wait for the last step, and let go of what only steps need."""
        self._previews = None
        if self._device.type == "cuda":
            self._ends[-1].synchronize()
            self._tell(len(self.finite))

    def seconds(self) -> list[float]:
        """Time of each step, after `finish`."""
        return [self._between(i) for i in range(len(self.finite))]

    def _tell(self, done: int) -> None:
        self._report(GenerationProgress("denoising", done, self._total, self._between(done - 1)))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, i: int) -> float:
        begin, end = self._begins[i], self._ends[i]
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000


def _bytes_read(progress: Progress, stage: Stage) -> GenerationProgress:
    return GenerationProgress(stage, progress.done, progress.total)


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
            f"a prompt fills the {MAX_TOKENS} tokens that the text encoder takes; what comes after "
            "them has no effect"
        )
