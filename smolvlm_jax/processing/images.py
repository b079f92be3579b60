"""SmolVLMImageProcessor: pictures to tiles, as float32 in the reference's layout or as flat uint8 for the device."""

from typing import ClassVar

from ..errors import InputError
from .assemble import STANDARD_MEAN, STANDARD_STD, check_return_tensors, flat_uint8, reference_layout
from .batch import BatchFeature
from .configured import Configured
from .fetch import is_source, load_image
from .geometry import TilePlan, plan_tiles
from .layout import nest_images
from .limits import MediaLimits
from .pixels import Picture, to_picture
from .threads import map_threads
from .tiles import Tiles, cut_tiles


class SmolVLMImageProcessor(Configured):
    """Pictures to tiles. Every argument can be set here, as an attribute later, or for one call.

    do_convert_rgb: any Pillow mode to RGB, what is transparent over white. do_resize, size: the first resize, long
    edge to size["longest_edge"] (or exactly to "height", "width"). resample: Pillow's filter, 1 = LANCZOS.
    do_image_splitting, max_image_size: cut into tiles of max_image_size["longest_edge"] pixels a side, the whole
    picture last; otherwise that one tile only. do_rescale, rescale_factor, do_normalize, image_mean, image_std: from
    0..255 to what the model reads. do_pad: one array for the batch, with all-zero pictures where a sample has fewer.

    Beyond the reference, all off by default: max_tiles and do_upscale=False save tiles (geometry.plan_tiles);
    exif_transpose turns Pillow images as files are turned; full_16bit keeps 16-bit greys from saturating;
    limits says what may be read (fetch.MediaLimits); num_threads is how many pictures are worked on at once.
    """

    DEFAULTS: ClassVar[dict] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": 4 * 364},
        "resample": 1,
        "do_image_splitting": True,
        "max_image_size": {"longest_edge": 364},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": STANDARD_MEAN,
        "image_std": STANDARD_STD,
        "do_pad": True,
        "max_tiles": None,
        "do_upscale": True,
        "exif_transpose": False,
        "full_16bit": False,
    }
    OWN = ("max_tiles", "do_upscale", "exif_transpose", "full_16bit")
    INIT_ONLY = ("limits", "num_threads", "return_row_col_info")
    NEUTRAL: ClassVar[dict] = {
        "data_format": ("channels_first",),
        "device": ("cpu",),
        "disable_grouping": (True, False),
        "default_to_square": (True, False),
        "do_center_crop": (False,),
        "crop_size": (),
        "pad_size": (),
        "image_seq_length": (),
    }
    TYPE_KEY = "image_processor_type"
    FILES = ("preprocessor_config.json",)
    NESTED_KEY = "image_processor"
    model_input_names = ("pixel_values", "pixel_attention_mask")

    def __init__(
        self,
        *,
        limits: MediaLimits | None = None,
        num_threads: int | None = None,
        return_row_col_info: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.return_row_col_info = return_row_col_info
        self.limits = limits or MediaLimits()
        self.num_threads = num_threads
        self.image_mean, self.image_std = (tuple(v) if isinstance(v, list) else v for v in (self.image_mean, self.image_std))

    def __call__(self, images, **kwargs) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images,
        *,
        return_tensors: str | None = None,
        return_row_col_info: bool | None = None,
        return_image_hashes: bool = False,
        input_data_format: str | None = None,
        pixel_format: str = "float32",
        num_threads: int | None = None,
        limits: MediaLimits | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Tiles of `images` (see layout.nest_images for the nestings; paths and URLs are loaded).

        Returns, with pixel_format="float32", the reference's layout: pixel_values float32 (b, n, 3, T, T), n the most
        tiles of any sample, and pixel_attention_mask int64 (b, n, T, T); with "uint8": pixel_values uint8
        (N, T, T, 3), the real tiles alone in row-major order of the batch, and num_tiles, an int32 scalar. With
        return_row_col_info also rows and cols, a list per sample of a number per picture (0 for one that is not
        split). With return_image_hashes also image_hashes, nested alike: digests of the uint8 tiles, equal for two
        pictures exactly if the model would see the same. Keywords override this object's arguments for the call.
        Raises InputError for arguments or arrays that make no sense, MediaError for files that do not decode.
        """
        check_return_tensors(return_tensors)
        options = self._options(kwargs)
        nested = nest_images(images)
        tiles = self._tiles(nested, options, input_data_format, limits or self.limits, num_threads)
        if pixel_format == "uint8":
            batch = flat_uint8([tile for sample in tiles for tile in sample], options)
        elif pixel_format == "float32":
            batch = reference_layout(tiles, options, return_tensors, num_threads or self.num_threads)
        else:
            raise InputError(f"pixel_format is {pixel_format!r}; it is 'float32' or 'uint8'")
        if self.return_row_col_info if return_row_col_info is None else return_row_col_info:
            batch["rows"] = [[picture.rows for picture in sample] for sample in tiles]
            batch["cols"] = [[picture.cols for picture in sample] for sample in tiles]
        if return_image_hashes:
            # once per picture, however often it occurs in the batch
            digests = {id(picture): picture.digest() for sample in tiles for picture in sample}
            batch["image_hashes"] = [[digests[id(picture)] for picture in sample] for sample in tiles]
        return batch

    def plan(self, height: int, width: int, **kwargs) -> TilePlan:
        """What would happen to a picture of this size: tiles, rows and columns, without a pixel."""
        return _plan(height, width, self._options(kwargs))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None):
        """(tiles, rows, cols) of a picture of this size; (0, 0, 0) for one that is not split, as the reference has
        it. The model still sees one tile then: `plan(height, width).num_tiles` counts it."""
        plan = self.plan(height, width, **(images_kwargs or {}))
        return (plan.num_tiles if plan.rows else 0), plan.rows, plan.cols

    @staticmethod
    def _picture(value, options, input_data_format, limits) -> Picture:
        return to_picture(
            load_image(value, limits) if is_source(value) else value,
            options["do_convert_rgb"],
            input_data_format,
            exif_transpose=options["exif_transpose"],
            full_16bit=options["full_16bit"],
        )

    def _tiles(self, nested, options, input_data_format, limits, num_threads) -> list[list[Tiles]]:
        """Tiles for every picture; one that occurs several times in the call is worked on once."""
        _check(options)

        def work(item):
            place, value = item
            try:
                picture = self._picture(value, options, input_data_format, limits)
                width, height = picture.image.size
                return cut_tiles(picture, _plan(height, width, options), options["resample"])
            except InputError as error:
                raise type(error)(f"images[{place[0]}][{place[1]}]: {error}") from error

        def key(value):
            return str(value) if is_source(value) and not isinstance(value, (bytes, bytearray)) else id(value)

        unique = {}
        for row, sample in enumerate(nested):
            for column, value in enumerate(sample):
                unique.setdefault(key(value), ((row, column), value))
        done = dict(zip(unique, map_threads(work, unique.values(), num_threads or self.num_threads), strict=True))
        return [[done[key(value)] for value in sample] for sample in nested]


def _plan(height: int, width: int, options: dict) -> TilePlan:
    names = ("size", "max_image_size", "do_resize", "do_image_splitting", "max_tiles", "do_upscale")
    return plan_tiles(height, width, **{name: options[name] for name in names})


def _check(options: dict):
    if options["do_resize"] and options["size"] is None:
        raise InputError("do_resize needs a size")
    if options["resample"] not in range(6):
        raise InputError(f"resample is {options['resample']!r}; it is one of Pillow's filters, 0 to 5")
    if options["do_rescale"] and options["rescale_factor"] is None:
        raise InputError("do_rescale needs a rescale_factor")
    if options["do_normalize"] and (options["image_mean"] is None or options["image_std"] is None):
        raise InputError("do_normalize needs image_mean and image_std")
