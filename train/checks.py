"""What the description of the model decides about a configuration: checked before weights are read and anything is written."""

from ..attention import check_form
from ..config import SmolVLMConfig, SmolVLMTextConfig
from ..errors import ConfigError, import_extra
from ..processing import SmolVLMTokenizer
from ..retrieval_model import model_of, require_text
from .config import DataConfig, TrainConfig
from .lora import matched

__all__ = ["check_length", "check_model", "check_vocabulary", "question_room"]


def check_model(config: TrainConfig, described: SmolVLMConfig) -> None:
    """Check the settings that depend on the model, without its weights.

    Args:
        config: of the run.
        described: of the model, with what its weights say of the output head.

    Raises:
        ConfigError: a setting does not fit the model, or there is no such form of attention.
        InputError: the model makes no text.
        MissingExtraError: a logger is not installed.
    """
    check_form(config.attention)
    model = model_of(described)
    require_text(model)
    check_length(config.data, model.config.text_config)
    question_room(config, model.config.text_config)
    if config.lora is not None:
        matched(model, config.lora)
    if "tensorboard" in config.loggers:
        import_extra("tensorboardX", "the TensorBoard logger", "tensorboard")


def check_length(data: DataConfig, config: SmolVLMTextConfig) -> None:
    """Raise ConfigError if a conversation that fills a row has more tokens than the model has positions."""
    positions = config.max_position_embeddings
    if data.length > positions:
        raise ConfigError(
            f"data.length is {data.length:,}, and the model has {positions:,} positions, which a conversation in such a row "
            f"could exceed: write data.length={positions} or less, and a larger data.batch_size for more rows"
        )


def check_vocabulary(tokenizer: SmolVLMTokenizer, config: SmolVLMTextConfig) -> None:
    """Raise ConfigError if the tokenizer has tokens that the model has no embedding for: they would be read as its last one."""
    beyond = sorted((id, token) for token, id in tokenizer.added_tokens.items() if id >= config.vocab_size)
    if beyond:
        raise ConfigError(
            f"the tokenizer has {len(beyond)} tokens beyond the model's {config.vocab_size} embeddings, the first of them "
            f"{beyond[0][1]!r} ({beyond[0][0]}); give the checkpoint more embeddings before training it"
        )


def question_room(config: TrainConfig, text: SmolVLMTextConfig) -> int:
    """Tokens of a held-out question that leaves room for its answer. Raises ConfigError if no question does."""
    new = config.evaluation.max_new_tokens if config.evaluation else 0
    positions = text.max_position_embeddings
    if new >= positions:
        raise ConfigError(f"evaluation.max_new_tokens is {new}, and the model has {positions} positions: no question fits")
    return positions - new
