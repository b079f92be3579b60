"""SmolVLMImageProcessor: pictures to tiles, as float32 in the reference's layout or as flat uint8 for the device."""

import os
from typing import Any, ClassVar

from PIL import Image

from ..errors import InputError
from ..habits import Neutral
from .assemble import PIXEL_FORMATS, arrange, flat_pictures, reference_layout
from .batch import BatchFeature, as_tensors, check_return_tensors
from .choices import one_of
from .fetch import image_size, is_path, is_source, load_image, loaded, pages_of
from .geometry import TilePlan, plan_tiles
from .layout import nest_images
from .media import MediaProcessor
from .pixels import to_picture
from .threads import map_threads
from .tiles import Tiles, cut_tiles


class SmolVLMImageProcessor(MediaProcessor):
    """Pictures to tiles. Every argument can be set here, as an attribute later, or for one call.

    Args:
        do_convert_rgb: convert pictures of any Pillow mode to RGB, with what is transparent laid over white.
        do_resize: resize the picture as `size` says before it is cut into tiles.
        size: {"longest_edge": pixels} scales the long side up or down to that many pixels; {"height", "width"} is exact.
        resample: Pillow's filter, 0 to 5; 1 is LANCZOS.
        do_image_splitting: cut the picture into tiles, with the whole picture as a last one; otherwise that one tile only.
        max_image_size: {"longest_edge": T}, the side of a tile in pixels; or T.
        do_rescale: multiply the values 0..255 by `rescale_factor`.
        rescale_factor: 1/255 takes 0..255 to 0..1.
        do_normalize: subtract `image_mean`, then divide by `image_std`.
        image_mean: one number, or one for each channel.
        image_std: one number, or one for each channel.
        do_pad: make one array of the batch, with all-zero tiles where a sample has fewer than others.
        max_tiles: at most so many tiles for a picture, the whole picture included (see `geometry.plan_tiles`). Not in
            the reference; None for no bound.
        do_upscale: False leaves a picture smaller than `size` at its own resolution, which saves tiles. Not in the
            reference.
        tiling: how the picture becomes tiles: "smolvlm"; "nanovlm", which stretches it once and puts the whole picture first;
            or "nanovlm-grid", without the whole picture. Prompts are made accordingly. Not in the reference.
        exif_transpose: turn Pillow images as their EXIF orientation says; files are always turned. Not in the reference.
        full_16bit: keep 16-bit greys from saturating at white, whatever they come as. Not in the reference.
        background: a colour ("white", "#rrggbb", or three numbers) that transparent parts are laid over. None: white for Pillow
            images and arrays; files show the colour that is stored under such parts, as in the reference. Not in the reference.
        pages: which pages of a TIFF are pictures: "first", "all" (each is a picture of its own, in order), or the number of
            one, counted from 1. Not in the reference.
        limits: what may be read for a picture given as a path or URL.
        num_threads: pictures worked on at once; None takes the processors there are, at most 8.
        return_row_col_info: return `rows` and `cols` from every call.

    Raises:
        InputError: an argument is unknown, or has a value that is not supported.
    """

    do_image_splitting: bool = True
    max_tiles: int | None = None
    do_upscale: bool = True
    tiling: str = "smolvlm"
    exif_transpose: bool = False
    full_16bit: bool = False
    background: Any = None
    pages: str | int = "first"
    return_row_col_info: bool = False

    OWN = ("max_tiles", "do_upscale", "tiling", "exif_transpose", "full_16bit", "background", "pages")
    UNSAVED = (*MediaProcessor.UNSAVED, "return_row_col_info")
    NEUTRAL: ClassVar[dict[str, Neutral]] = {
        **MediaProcessor.NEUTRAL,
        "disable_grouping": Neutral((True, False)),
        "pad_size": Neutral(),
        "image_seq_length": Neutral((), "it is image_seq_len, an argument of SmolVLMProcessor"),
    }
    TYPE_KEY = "image_processor_type"
    FILES = ("preprocessor_config.json",)
    NESTED_KEY = "image_processor"

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        return_image_hashes: bool = False,
        input_data_format: str | None = None,
        data_format: str | None = None,
        pixel_format: str = "float32",
        **kwargs: Any,
    ) -> BatchFeature:
        """The tiles of a batch of pictures.

        Args:
            images: a picture (Pillow image, array, path, URL, base64 text, bytes of a file), a list of pictures, or a
                list of lists, one for each sample (see `layout.nest_images`).
            return_tensors: None, "np" or "jax"; without it arrays are numpy arrays too.
            return_image_hashes: return `image_hashes`.
            input_data_format: "channels_first" or "channels_last" for arrays; None decides by the shape.
            data_format: "channels_last" for float32 pixel_values (b, n, T, T, 3); None or "channels_first" for the reference's.
            pixel_format: "float32" for the reference's layout, "uint8" for the real tiles alone.
            **kwargs: arguments of the constructor, for this call. None for limits, num_threads or return_row_col_info takes
                this object's setting.

        Returns:
            With pixel_format="float32": pixel_values, float32 (b, n, 3, T, T), where n is the largest number of tiles of
            a sample, and pixel_attention_mask, int64 (b, n, T, T). With "uint8": pixel_values, uint8 (N, T, T, 3), the
            tiles of all pictures in row-major order of the batch, and num_tiles = N, an int32 scalar. On request also
            rows and cols, a list for each sample of one number for each picture (0 for a picture that is not split), and
            image_hashes, nested alike: digests of the uint8 tiles, equal exactly if the model sees the same tiles.

        Raises:
            InputError: arguments or arrays that make no sense, or no picture in the whole batch.
            MediaError: a file that cannot be read or decoded, or exceeds the limits.
        """
        kind = check_return_tensors(return_tensors)
        one_of("pixel_format", pixel_format, PIXEL_FORMATS)
        call = self._for_call(kwargs)
        nested = [[page for picture in sample for page in call.pages_of(picture)] for sample in nest_images(images)]
        if not any(nested):
            raise InputError("no pictures in the whole batch; leave images out")
        tiles = call._tiles(nested, input_data_format)
        if pixel_format == "uint8":
            batch = flat_pictures([picture for sample in tiles for picture in sample], call)
        else:
            batch = reference_layout(tiles, call, do_pad=call.do_pad, return_tensors=kind, num_threads=call.num_threads)
            arrange(batch, data_format)
        if call.return_row_col_info:
            batch["rows"] = [[picture.rows for picture in sample] for sample in tiles]
            batch["cols"] = [[picture.cols for picture in sample] for sample in tiles]
        if return_image_hashes:
            # Once per picture, however often it occurs in the batch.
            digests = {id(picture): picture.digest() for sample in tiles for picture in sample}
            batch["image_hashes"] = [[digests[id(picture)] for picture in sample] for sample in tiles]
        return as_tensors(batch, kind)

    __call__ = preprocess

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What processor_config.json and preprocessor_config.json say.

        Args:
            pretrained_model_name_or_path: as in `from_pretrained`.
            **kwargs: likewise.

        Returns:
            The mapping, {} where there is neither, and the keywords that do not say where they are.

        Raises:
            CheckpointError: as `from_pretrained` raises it.
            InputError: likewise.
        """
        return cls._read("get_image_processor_dict", pretrained_model_name_or_path, kwargs)

    def pages_of(self, picture: Any, **kwargs: Any) -> list[Any]:
        """The pictures that stand for `picture`: more than one for a TIFF of several pages with pages="all".

        Args:
            picture: a picture as `preprocess` takes it.
            **kwargs: arguments of the constructor, for this call.

        Returns:
            The picture itself, or one for each page.

        Raises:
            InputError: `pages` is not valid.
            MediaError: a file that cannot be read, or has no such page.
        """
        call = self._for_call(kwargs) if kwargs else self
        return pages_of(picture, call.pages, call.limits)

    def plan(self, height: int, width: int, **kwargs: Any) -> TilePlan:
        """What happens to a picture of a given size, without its pixels.

        Args:
            height: in pixels.
            width: in pixels.
            **kwargs: arguments of the constructor, for this call.

        Returns:
            Its resizes, rows, columns and number of tiles.
        """
        return self._for_call(kwargs)._plan(height, width)

    def plan_picture(self, picture: Any, **kwargs: Any) -> TilePlan:
        """What happens to a picture, from its header or shape alone: no pixel is decoded.

        Args:
            picture: a picture as `preprocess` takes it.
            **kwargs: arguments of the constructor, for this call.

        Returns:
            Its resizes, rows, columns and number of tiles.

        Raises:
            MediaError: a file that cannot be read, or exceeds the limits.
        """
        call = self._for_call(kwargs)
        return call._plan(*image_size(picture, call.limits, call.exif_transpose))

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> tuple[int, int, int]:
        """What a picture of a given size becomes, as the reference counts it.

        A picture that is not split gives (0, 0, 0), although the model sees one tile of it:
        `plan(height, width).num_tiles` counts that tile.

        Args:
            height: in pixels.
            width: in pixels.
            images_kwargs: arguments of the constructor, for this call.

        Returns:
            The numbers of tiles, rows and columns.
        """
        plan = self.plan(height, width, **(images_kwargs or {}))
        return (plan.num_tiles if plan.rows else 0), plan.rows, plan.cols

    def _plan(self, height: int, width: int) -> TilePlan:
        return plan_tiles(
            height,
            width,
            size=self.size,
            max_image_size=self.max_image_size,
            do_resize=self.do_resize,
            do_image_splitting=self.do_image_splitting,
            max_tiles=self.max_tiles,
            do_upscale=self.do_upscale,
            tiling=self.tiling,
        )

    def _cut(self, value: Any, input_data_format: str | None) -> Tiles:
        if is_source(value):
            value = load_image(value, self.limits, full_16bit=self.full_16bit, background=self.background)
        elif isinstance(value, Image.Image):
            value = loaded(value, self.limits)
        background = {} if self.background is None else {"background": self.background}
        picture = to_picture(
            value,
            do_convert_rgb=self.do_convert_rgb,
            input_data_format=input_data_format,
            exif_transpose=self.exif_transpose,
            full_16bit=self.full_16bit,
            **background,
        )
        return cut_tiles(picture, self._plan(*picture.image.size[::-1]), self.resample)

    def _tiles(self, nested: list[list], input_data_format: str | None) -> list[list[Tiles]]:
        """Tiles of every picture; one that occurs several times in the call is worked on once."""

        def work(item: tuple[int, int, Any]) -> Tiles:
            row, column, value = item
            try:
                return self._cut(value, input_data_format)
            except InputError as error:
                raise type(error)(f"images[{row}][{column}]: {error}") from error

        def key(value: Any) -> str | int:
            return str(value) if is_path(value) else id(value)

        unique: dict[str | int, tuple[int, int, Any]] = {}
        for row, sample in enumerate(nested):
            for column, value in enumerate(sample):
                unique.setdefault(key(value), (row, column, value))
        done = dict(zip(unique, map_threads(work, unique.values(), self.num_threads), strict=True))
        return [[done[key(value)] for value in sample] for sample in nested]
