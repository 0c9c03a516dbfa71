"""A trial on the target itself: what no look at its config or signature can tell.

Code of a model may read padding, positions, masks or the cache in a way of its own. So, once per model, a few tokens
are decoded both ways.
"""

from __future__ import annotations

import weakref

import torch
from transformers import DynamicCache

from .attention import attention_of
from .capabilities import UnsupportedTargetError, input_device
from .cuda_graphs import recorded_passes
from .prompt import PromptLayout
from .target import prefill, prompt_arguments, verify
from .versions import cache_argument

_probed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> attention implementations that passed


@torch.no_grad()
@recorded_passes(False)
def probe_target(model) -> None:
    """Once per model and attention: verify three tokens of two rows that have got apart, beside plain forwards.

    The tolerance is what the model's own cached decoding differs by, which is much in half precision, and never less
    than float32's: families compute their routing or rotary embeddings in it, in float64 as well. Windows and chunks
    longer than the probe's eleven tokens are not seen.

    Raises:
        UnsupportedTargetError: the logits differ. The reason is unknown: code of the model reads padding, positions,
            masks or the cache in a way of its own.
    """
    config = model.config.get_text_config(decoder=True)
    passed = _probed.setdefault(model, set())
    if attention_of(model) in passed:
        return
    device = input_device(model)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    width, block = 5, 3
    # In float64, eager attention (softmax in float32) is NaN wherever a row is padded, in plain generate() as well.
    padding = 0 if (attention_of(model), model.dtype) == ("eager", torch.float64) else 2
    tokens = (torch.arange(2 * (width + 2 * block), device=device).view(2, -1) * 7919 + 11) % config.vocab_size
    prompt, first, second = tokens.split([width, block, block], dim=1)
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    kept = [block, 1]  # of the first block, so that the second one stands at another position in each row
    try:
        layout = PromptLayout.from_mask(mask, prompt)
        _, cache = prefill(model, prompt, layout, width + 2 * block + 1, block, prompt_arguments(model, layout))
        verify(model, cache, first)
        cache.advance(torch.tensor(kept, device=device), width + max(kept))
        ours = verify(model, cache, second).cpu().double()
        for row, count in enumerate(kept):
            context = torch.cat([prompt[row][mask[row].bool()], first[row, :count]])[None]
            text = torch.cat([context, second[row : row + 1]], dim=1)
            whole = model(input_ids=text, use_cache=False).logits[0, -block:].cpu().double()
            own_cache = DynamicCache(config=model.config)
            cached = dict(cache_argument(model, own_cache), use_cache=True)
            model(input_ids=context, **cached)
            cached = model(input_ids=second[row : row + 1], **cached).logits[0]
            own_error = (cached.cpu().double() - whole).abs().median()
            allowed = 8 * own_error + precision * whole.std()
            error = (ours[row] - whole).abs().median()
            if not error <= allowed:  # also when it is NaN
                raise ValueError(f"logits differ by {error:.2g} from plain decoding, where {allowed:.2g} is usual")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedTargetError(
            f"{type(model).__name__} cannot be decoded speculatively: a trial with two rows of different length did "
            f"not agree with plain decoding ({type(error).__name__}: {error}). Call generate() without custom_generate "
            "and assistant_model instead."
        ) from error
    passed.add(attention_of(model))
