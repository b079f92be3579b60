"""What lmms-eval finds under the entry point group `lmms_eval.models`."""


def manifest():
    """The manifest of `smolvlm_jax`: the chat form, and the simple form for tasks that compare probabilities."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="smolvlm_jax",
        simple_class_path="smolvlm_jax.evals.lmms.SimpleSmolVLM",
        chat_class_path="smolvlm_jax.evals.lmms.ChatSmolVLM",
        aliases=("smolvlm-jax",),
    )
