"""What a set of tensor names looks like; for messages that point the right way."""

import re
from collections.abc import Iterable

# the first that has a name like it decides; most special first
_SIGNS: tuple[tuple[str, str], ...] = (
    (r"decoder\.lm\.base_model\.model\..+", "an Emu instruct release (kind emu-instruct)"),
    (r"decoder\.lm\.model\.layers\..+", "an Emu pretrain release (kind emu)"),
    (r"base_model\.model\..+\.lora_[AB]\..*weight", "a PEFT adapter (kind peft)"),
    (r"visual\.blocks\.\d+\.attn\.q_bias", "an EVA-CLIP file (kind eva)"),
    (r"(visual\.|vision_model\.).+", "a vision tower, but not EVA-CLIP g/14"),
    (r"layers\.\d+\.attention\.wq\.weight", "a LLaMA in Meta's format (kind meta-llama)"),
    (r"model\.layers\.\d+\.self_attn\.q_proj\.weight", "a Hugging Face LLaMA (kind llama)"),
    (r"(down|up)_blocks\..+\.attn2\.to_k\.weight", "a diffusers UNet (kind unet)"),
    (r"decoder\.up_blocks\..+\.conv1\.weight", "a diffusers VAE (kind vae)"),
    (r"unet\..+", "full tensors of mmtrain (a UNet)"),
    (r"blocks\.\d+\.attention\.q\.weight", "full tensors of mmtrain"),
    (r"vision\.blocks\.\d+\.attention\.q\.weight", "full tensors of mmtrain"),
)


def kind_of(names: Iterable[str]) -> str | None:
    """A few words on whose names these are, or None."""
    listed = list(names)
    for pattern, words in _SIGNS:
        if any(re.fullmatch(pattern, name) for name in listed):
            return words
    return None
