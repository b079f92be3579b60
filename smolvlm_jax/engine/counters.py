"""`Counters`: what the engine has done so far."""

from dataclasses import asdict, dataclass

__all__ = ["Counters"]


@dataclass
class Counters:
    """Sums since the engine was made.

    Attributes:
        requests: answers and scores given.
        errors: requests that could not be answered.
        prompt_tokens: of the prompts that were run.
        new_tokens: of the answers given.
        scored_tokens: of continuations that were given.
        tiles: of the prompts that were run.
        encoded_tiles: tiles that went through the encoder; the others were found in the pool of features.
        encoder_rows: the same with the padding of the encoder's batches.
        prefill_columns: prompt tokens with the padding of packed rows.
        decode_steps: steps of all rings.
        decode_rows: rows of these steps.
        decode_live_rows: those of them that belonged to a request.
        cache_columns: columns of the caches at these steps, of all rows.
        cache_live_columns: those of them that requests used.
        seconds: in `generate` and `loglikelihood`, without compilation.
        prefill_seconds, decode_seconds: that the device needed, as seen by the host.
        device_idle_seconds: that the device had nothing to do.
    """

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    scored_tokens: int = 0
    tiles: int = 0
    encoded_tiles: int = 0
    encoder_rows: int = 0
    prefill_columns: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    decode_live_rows: int = 0
    cache_columns: int = 0
    cache_live_columns: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    device_idle_seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """The counters by name, and shares made of them: of prefill tokens, encoder tiles and decode rows that were padding, of
        cache columns that live rows used, of the time that the device had nothing to do."""
        share = lambda part, whole: part / whole if whole else 0.0
        padding = lambda used, whole: 1 - used / whole if whole else 0.0
        return {
            **asdict(self),
            "prefill_padding_share": padding(self.prompt_tokens, self.prefill_columns),
            "encoder_padding_share": padding(self.encoded_tiles, self.encoder_rows),
            "decode_padding_share": padding(self.decode_live_rows, self.decode_rows),
            "live_cache_share": share(self.cache_live_columns, self.cache_columns),
            "device_idle_share": share(self.device_idle_seconds, self.seconds),
        }
