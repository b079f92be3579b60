"""What the image and the video processor have in common: their arguments, their checks, their defaults."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar, Self

from ..errors import InputError
from .configured import Configured, configured
from .limits import MediaLimits
from .pixels import PixelRule


@configured
class MediaProcessor(Configured, PixelRule):
    """Base of the image and the video processor; they describe the arguments."""

    do_convert_rgb: bool = True
    do_resize: bool = True
    size: dict[str, int] = field(default_factory=lambda: {"longest_edge": 4 * 364})
    resample: int = 1
    max_image_size: dict[str, int] = field(default_factory=lambda: {"longest_edge": 364})
    do_pad: bool = True

    INIT_ONLY: ClassVar[tuple[str, ...]] = ("limits", "num_threads")
    NEUTRAL: ClassVar[dict[str, tuple]] = {
        "data_format": ("channels_first",),
        "device": ("cpu",),
        "default_to_square": (True, False),
        "do_center_crop": (False,),
        "crop_size": (),
    }
    model_input_names = ("pixel_values", "pixel_attention_mask")

    def __init__(self, *, limits: MediaLimits | None = None, num_threads: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.limits = limits or MediaLimits()
        self.num_threads = num_threads
        # A JSON file has lists; the default is a tuple.
        self.image_mean, self.image_std = (tuple(v) if isinstance(v, list) else v for v in (self.image_mean, self.image_std))

    def _for_call(
        self, kwargs: Mapping[str, Any], *, limits: MediaLimits | None = None, num_threads: int | None = None
    ) -> Self:
        """This processor with the arguments of one call, checked. Raises InputError where they make no sense."""
        call = self._with(kwargs)
        call.limits = limits or self.limits
        call.num_threads = num_threads or self.num_threads
        if call.do_resize and call.size is None:
            raise InputError("do_resize needs a size")
        if call.resample not in range(6):
            raise InputError(f"resample is {call.resample!r}; it is one of Pillow's filters, 0 to 5")
        if call.do_rescale and call.rescale_factor is None:
            raise InputError("do_rescale needs a rescale_factor")
        if call.do_normalize and (call.image_mean is None or call.image_std is None):
            raise InputError("do_normalize needs image_mean and image_std")
        return call
