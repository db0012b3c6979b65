"""The keys of state dicts: which weights of a checkpoint to take, wrapper prefixes, key layouts of other projects.

A MetaFormer's state dict has timm's keys (`stem.conv`, `stages.i.blocks.j.*`, `head.*`), a GFNet's has its authors'.
Understood are mmpretrain's RIFormer (training and deploy form) and PoolFormer, the PoolFormer and the GFNet-H of their
authors, and timm's PoolFormer.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from riformer.model.gfnet import resample_state
from riformer.model.metaformer import MetaFormer

# Names of weights in checkpoints: first timm's, in its order, then those of tutorials and other trainers.
EMA_NAMES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "params_ema", "ema")
PLAIN_NAMES = ("state_dict", "model", "model_state_dict", "module", "params", "network", "net", "weights")
_KEY_RULES: list[tuple[str, Any]] = [  # pattern, replacement (a string or a function of the match)
    (r"^backbone\.", ""),
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^network\.([135])\.proj\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv."),
    (r"^network\.([0246])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"\.norm_reparam\.", ".norm1."),
    (r"\.token_mixer\.affine\.", ".token_mixer."),
    (r"\.layer_scale_([12])$", r".layer_scale\1.scale"),
    (r"^norm6?\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
_BLOCK_KEY = re.compile(r"(stages\.\d+\.blocks\.\d+|network\.\d+\.\d+|blocks\.\d+\.\d+)\.")


def choose_weights(content: Any, use_ema: bool = True) -> tuple[Any, str, list[str]]:
    """The weights to take from a checkpoint's content, as timm chooses: EMA weights first where there are any.

    Args:
        content: what the file holds; a state dict, or a dict with state dicts under the usual names.
        use_ema: False takes the plain weights of a checkpoint that has both.

    Returns:
        The chosen state dict, or `content` where no usual name leads to one; the name that it has in the checkpoint, or
        ""; and the names of the state dicts that were not chosen.
    """
    order = (*EMA_NAMES, *PLAIN_NAMES) if use_ema else PLAIN_NAMES
    present = [name for name in (*EMA_NAMES, *PLAIN_NAMES) if isinstance(content, Mapping) and _holds(content, name)]
    chosen = next((name for name in order if name in present), "")
    if not chosen:
        return content, "", present
    inner, name, _ = choose_weights(content[chosen], use_ema)
    return inner, f"{chosen}.{name}" if name else chosen, [other for other in present if other != chosen]


def _holds(content: Mapping, name: str) -> bool:
    """Whether there is a dict of this name that holds tensors, or another dict that does."""
    inner = content.get(name)
    if not isinstance(inner, Mapping):
        return False
    return any(isinstance(value, Tensor) for value in inner.values()) or choose_weights(inner)[1] != ""


def unwrap(state: Mapping[str, Tensor], is_known: Callable[[str], bool]) -> dict[str, Tensor]:
    """The state dict without the prefixes of wrappers (`module.`, `_orig_mod.`, `ema_model.module.`, any other).

    A prefix is removed while all keys share it and none of them is known. A counter of the wrapper's own, such as
    AveragedModel's `n_averaged`, is removed with it.
    """
    unwrapped = dict(state)
    while unwrapped and not any(map(is_known, unwrapped)):
        inner = {key: value for key, value in unwrapped.items() if "." in key or value.numel() > 1}
        prefixes = {key.partition(".")[0] for key in inner}
        if len(prefixes) != 1 or not all("." in key for key in inner):
            break
        unwrapped = {key.partition(".")[2]: value for key, value in inner.items()}
    return unwrapped


def is_block_key(key: str) -> bool:
    """Whether the key is one of a block's, in a layout that is understood."""
    return _BLOCK_KEY.match(key) is not None


def is_gfnet(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a GFNet."""
    return any(key.endswith(".filter.complex_weight") for key in state)


def to_timm_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's keys, from any layout that is understood, wrapped or not.

    GFNet's keys stay the authors'.

    Shape: mmpretrain's affine weights [C, 1, 1, 1] become [C]; all others stay.

    Raises:
        ValueError: two keys would get one name.
    """
    state = unwrap(state, is_block_key)
    if is_gfnet(state):
        return state
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = name
        for pattern, replacement in _KEY_RULES:
            key = re.sub(pattern, replacement, key)
        is_affine = key.endswith("token_mixer.weight") and tensor.shape[1:] == (1, 1, 1)
        if key in renamed:
            raise ValueError(f"{name!r} and an earlier key of the checkpoint both mean {key!r}")
        renamed[key] = tensor.flatten() if is_affine else tensor
    return renamed


def weightless_form(state: Mapping[str, Tensor]) -> str:
    """Which network without mixer weights the layout belongs to: "deploy", "poolformer", or "" where it does not say.

    mmpretrain renames the norms of the deploy form, and only PoolFormers without such norms have the authors' keys.
    """
    if any(".norm_reparam." in key for key in state):
        return "deploy"
    return "poolformer" if any(re.search(r"(^|\.)network\.\d+\.\d+\.", key) for key in state) else ""


def fit_state(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint gives `model`: keys of a MetaFormer renamed, filters and GFNet's positions on its grid."""
    state, _, _ = choose_weights(content)
    state = to_timm_keys(state) if isinstance(model, MetaFormer) else unwrap(state, model.state_dict().__contains__)
    return resample_state(state, model)
