"""Every patch of a library in one place: which library and version, symptom, the test that needs it, when it can go.

Seven cannot be here, since they are part of the code that needs them:

    library      bitsandbytes 0.50.2, on processors with AVX512-BF16; in common.load_model
    symptom      the first forward without gradients in eval mode repacks 4-bit weights for good, for a kernel without
                 gradient: every later training step is wrong without an error (cosine 0.18 to the true gradient). It
                 rounds scales to bf16, and from some 25 tokens on it is slower than to dequantise and multiply
    test         tests/test_workarounds.py: test_gradients_are_the_same_after_an_evaluation
    remove when  bitsandbytes keeps the unpacked weights for forwards with gradients

    library      PEFT 0.21; in common.add_adapters (its warning becomes an error) and load_model (path of the base)
    symptom      an adapter with other weights changes nothing; each save looks the base's name up on the hub
    test         tests/test_models.py: test_an_adapter_that_would_change_nothing_is_refused
    remove when  PEFT refuses such adapters, and saves without the base

    library      PEFT 0.21; in scoring.FastLabelScorer._using (a private method)
    symptom      only PeftModel.forward, with logits of all positions, takes rows of several adapters
    test         tests/test_creditmix_model.py: test_variants_score_as_models_loaded_alone
    remove when  PEFT has a public context for mixed batches

    library      TRL 1.16; in training.pairs (share_prompts, PairTrainer._prepare_dataset)
    symptom      a pair's prompt runs twice, and texts are tokenised with control tokens switched on
    test         tests/test_training_pairs.py: test_a_prompt_is_run_once_with_the_same_gradients
    remove when  TRL shares a pair's prompt and takes token ids

    library      transformers 5.24 and PEFT 0.21; in training.run (progress bar, README.md)
    symptom      Ctrl-C leaves a bar below the message; a model card with this machine's paths is saved
    test         tests/test_training_run.py: test_run_folder (the files)
    remove when  the Trainer closes its bar, and saving has a flag for the model card

    library      transformers 5.24 and accelerate 1; in training.run.RowOrder (a private method of the Trainer)
    symptom      after a resume grouped rows come in another order, some twice and some never; in several processes all
    test         tests/test_training_run.py: test_seed_and_epoch_alone_decide_the_order_of_rows
    remove when  the Trainer's samplers draw from seed and epoch alone

    library      asyncio of Python 3.11; in serve_creditmix.bound_socket
    symptom      Nagle's algorithm stays on for sockets without a protocol number: each answer waits 40 ms
    test         tests/test_serving_app.py: test_a_port_in_use_is_said_before_anything_loads
    remove when  asyncio switches it off for every TCP socket
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from typing import Any

# Up to this many tokens a forward the packed kernel is faster (measured: 2.9 times at 1 token, 1.35 at 16, 0.9 at 32).
PACKED_TOKENS = 16


def quiet_libraries() -> None:
    """Silence messages at each load: a bar for every weight, an absent kernel package, deprecations to come.

    library      transformers 5.24, bitsandbytes 0.50
    symptom      lines at every start that users take for problems
    test         none: output only
    remove when  the libraries log these at debug level"""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@functools.cache
def use_cache_where_no_hub_answers() -> None:
    """Switch the hub's library to its cache where no hub can be reached.

    library      huggingface_hub, as transformers 5.24 uses it
    symptom      half a minute of retries for each file, cached or not, on a machine without a network
    test         tests/test_models.py: test_without_a_network_the_hub_is_asked_once
    remove when  one failed connection is enough for it"""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    try:
        if not constants.HF_HUB_OFFLINE:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the hub answered, even if with an error
    except OSError:
        constants.HF_HUB_OFFLINE = True


def pack_for_decoding(model: Any) -> None:
    """Give 4-bit layers a packed copy of their weights for forwards of few tokens, on AVX512-BF16 processors; prompts
    and training keep the weights as they are.

    library      bitsandbytes 0.50.2
    symptom      without it decoding of one row dequantises every weight for one token; its own packing replaces the
                 weights (see this module's docstring)
    test         tests/test_workarounds.py: test_packed_weights_serve_forwards_of_few_tokens_alone
    remove when  bitsandbytes packs a copy and chooses by the number of tokens"""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, gemv_4bit, has_avx512bf16

    if model.dtype != torch.bfloat16 or not has_avx512bf16():
        return

    def forward(module: Any, packed: Any, state: Any, x: Any) -> Any:
        if torch.is_grad_enabled() or x.numel() > PACKED_TOKENS * x.shape[-1]:
            return type(module).forward(module, x)
        out = gemv_4bit(x, packed, state=state)
        return out if module.bias is None else out + module.bias

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.weight.device.type == "cpu":
            weight = module.weight
            if weight.quant_state.shape[0] % 32 == 0 and weight.quant_state.shape[1] % 64 == 0:
                packed, state = _convert_weight_packed_for_cpu(weight.data, copy.copy(weight.quant_state))
                module.forward = functools.partial(forward, module, packed, state)


def refuse_kernels_without_gradient() -> None:
    """Turn into an error the one warning that shows a 4-bit CPU kernel without gradient (this module's docstring).

    library      bitsandbytes 0.50.2, PyTorch 2.13
    symptom      training continues with wrong gradients
    test         tests/test_workarounds.py: test_a_kernel_without_gradients_ends_the_training
    remove when  the kernel has a gradient"""
    warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")


def compute_fused_head_where_supervised() -> None:
    """Let TRL's fused output head leave prompts out on a CPU too.

    library      TRL 1.16
    symptom      where Triton does not run it projects every position, so that compiling accelerators do not see a new
                 shape with every batch; a CPU compiles nothing and pays for the prompts
    test         tests/test_workarounds.py: test_the_fused_head_scores_answers_alone
    remove when  TRL has a flag for it"""
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")


def adapters_to_float32(model: Any, exact: dict[str, Any]) -> None:
    """Undo TRL's cast of a 4-bit model's adapters to bf16, in which the updates of small learning rates vanish.
    exact: trainable adapter weights by name from before the trainer was built, to start at an adapter's own values.

    library      TRL 1.16; PEFT 0.21 for the casts of inputs
    symptom      losses that stop falling at small learning rates. On a CPU PEFT does not see autocast and casts each
                 input to float32 first, which autocast undoes: two copies of every activation for the same numbers
    test         tests/test_workarounds.py: test_adapters_train_in_float32_and_without_rounding
    remove when  TRL leaves the type of adapters alone"""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = exact.get(name, parameter.data).float()
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def impatient_protocol(seconds: float) -> type:
    """Return uvicorn's HTTP protocol, closing connections that send no complete request head within `seconds`.

    library      uvicorn 0.54
    symptom      it waits for a request head for ever; connections that send nothing use up the sockets
    test         tests/test_serving_app.py: test_half_a_request_head_is_not_waited_for
    remove when  uvicorn has a timeout for request heads"""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ImpatientProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, self._close_without_request)

        def _close_without_request(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return ImpatientProtocol
