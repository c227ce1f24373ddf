"""Figures of quality and speed: what a student says against its teacher, on the same tokens."""

# N loss tokens of a micro-batch, C tokens of a chunk, V vocabulary, M models

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from compress.comparison import CHUNK_TOKENS, compare_chunk
from compress.errors import NumericalError
from compress.models import OutputHead, logits_of, output_head, without_padding
from compress.parallel import ALONE, Ranks
from compress.step import trunk
from compress.tokens import TokenBatch


@torch.inference_mode()
def language_modelling(
    models: Mapping[str, PreTrainedModel],
    batches: Iterable[TokenBatch],
    teacher: str = "teacher",
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, float]]:
    """For each model, over the loss tokens of the batches: loss (nats per token), perplexity, kl_to_teacher (nats per
    token, KL(teacher || model)), top1_agreement (share of tokens at which both rank the same token first), num_tokens.

    Over the ids that all models have: what one's head has beyond is padding. They see the same micro-batch in turn, so
    the teacher runs once; logits exist for 256 tokens at a time and their softmax is in float32. Raises NumericalError
    for a model whose loss isn't finite, or when there is no token.

    Every rank is given all of the batches and takes its share; all of them return the same, to the bit, as one process
    would.
    """
    heads = dict(zip(models, without_padding(*map(output_head, models.values())), strict=True))
    rows = []  # of each batch the sums of each model, and how many tokens they are over
    for batch in ranks.mine(batches):
        sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
        mask = batch.loss_mask
        label_N = torch.roll(batch.input_ids, -1, 1)[mask]
        hidden = {name: trunk(model, batch)[mask] for name, model in models.items()}
        for start in range(0, len(label_N), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            log_p_CV = _log_probabilities(hidden[teacher][chunk], heads[teacher])
            p_CV = log_p_CV.exp()
            for name in models:
                log_q_CV = log_p_CV if name == teacher else _log_probabilities(hidden[name][chunk], heads[name])
                sums[name] += compare_chunk(p_CV, log_p_CV, log_q_CV, label_N[chunk])
        rows.append(torch.cat([*sums.values(), torch.tensor([len(label_N)], dtype=torch.float64)]))
    width = 3 * len(models) + 1
    total = ranks.in_order(torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)).sum(0)
    count = int(total[-1])
    if count == 0:
        raise NumericalError("there is no loss token to evaluate on; give the validation set more text")
    result = {}
    for name, means in zip(models, (total[:-1] / count).view(-1, 3).tolist(), strict=True):
        kl, loss, agreement = means
        if not math.isfinite(loss):
            raise NumericalError(
                f"the loss of {name} on the validation text is {loss}; set compute_dtype=float32, and if that doesn't "
                "help, its weights hold values that are not finite: run the stage that made them again"
            )
        result[name] = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "kl_to_teacher": kl,
            "top1_agreement": agreement,
            "num_tokens": count,
        }
    return result


def _log_probabilities(hidden_CD: Tensor, head: OutputHead) -> Tensor:
    return torch.log_softmax(logits_of(hidden_CD, head).float(), -1)


@torch.inference_mode()
def generation_speed(
    models: Mapping[str, PreTrainedModel], prompt: Tensor, num_tokens: int, repeats: int = 3
) -> dict[str, float]:
    """Tokens per second of greedy generation of `num_tokens` after `prompt` (1, P), with the cache, prefill included.

    The models take turns, and each one's median counts, so that a busy machine slows all of them alike.
    """
    # Of its own, so that beams or sampling in a model's generation_config.json don't change what is timed.
    greedy = GenerationConfig(
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        num_beams=1,
        pad_token_id=0,
    )
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):  # the first round warms up
        for name, model in models.items():
            ids = prompt.to(model.device)
            start = time.perf_counter()
            model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=greedy,
            ).cpu()
            seconds[name].append(time.perf_counter() - start)
    return {name: num_tokens / statistics.median(times[1:]) for name, times in seconds.items()}
