"""Knowledge distillation (KD): imitate a teacher's answers and, where rows carry them, its probabilities.

Rows are {"input", "teacher_output"}, optionally with "token_probs" (kd_prepare.py --top_k) or "label_probs": {label:
p}. Departures from the textbook: no teacher is in memory. With token_probs the KL term compares teacher and student at
every token of the answer, over the teacher's K most probable tokens and one class for the rest; with
label_probs where labels part: at the assistant start the labels' first tokens, and along a row's answer the tokens
that other labels with the same beginning continue with. It is summed over rows and divided by the step's supervised
tokens, so it obeys gradient accumulation.

    python kd_train.py --student smollm2-135m --data data/creditmix_kd.jsonl --save_dir runs/creditmix_kd
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common import PromptEncoder
from distil.cli import refuse_unused, run_script
from distil.models import resolve_student
from distil.processes import print_note
from distil.runs import claimed
from distil.training.data import (
    completion_dataset,
    label_probabilities,
    load_tokenizer,
    read_data,
    with_label_nodes,
    with_token_probs,
)
from distil.training.flags import ABOVE_0, LORA, SHARE, TrainOptions, train_options, training_parser, unused

if TYPE_CHECKING:
    import torch

# The whitepaper's section 3 for large students; measured on smollm2-135m for small ones (docs/recipes.md).
LARGE = {"epochs": 1.0, "learning_rate": 2e-4, "batch_size": 1, "grad_accum": 8, "lora_dropout": 0.05} | LORA
NOTHING = -1e9  # a score of no probability, and not -inf: 0 * inf would be NaN
SMALL = {"epochs": 1.0, "learning_rate": 2e-3, "batch_size": 16, "grad_accum": 1, "lora_dropout": 0.0} | LORA


@dataclass(frozen=True, kw_only=True)
class KdOptions(TrainOptions):
    """What all trainers have, and the flags of KD."""

    REPEATS = True
    LIMITS = TrainOptions.LIMITS | {"kd_alpha": SHARE, "kd_temperature": ABOVE_0}
    adapter: str | None = None
    kd_alpha: float = 0.9
    kd_temperature: float = 1.0


def build_parser() -> argparse.ArgumentParser:
    fields = '{"input", "teacher_output"}, optional "token_probs" or "label_probs"'
    parser = training_parser(__doc__, SMALL, LARGE, "creditmix_kd", fields, kind=KdOptions)
    add = parser.add_argument_group("distillation").add_argument
    add("--kd_alpha", type=float, default=0.9, help="share of KL(teacher || student) in the loss, 0..1 (%(default)s)")
    add("--kd_temperature", type=float, default=1.0, help="softens both, KL times its square (%(default)s)")
    return parser


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(teacher || student) of scores [rows, classes], summed over the rows."""
    import torch

    softened = [torch.log_softmax(scores / temperature, dim=-1) for scores in (student, teacher)]
    return temperature**2 * torch.nn.functional.kl_div(*softened, reduction="sum", log_target=True)


def distillation_loss_sum(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], alpha: float, temperature: float
) -> torch.Tensor:
    """Return (1 - a) CE + a T^2 KL(teacher || student), summed over the batch (Hinton et al. 2015).
    logits: [tokens, vocabulary], float32, and batch["labels"]: [tokens], of the supervised tokens row after row;
    batch["nodes"]: [nodes], the ones where labels part (of single-token labels a row's first): each has its KL;
    batch["child_ids"]: [nodes, children], the token ids that labels continue with there, padded with -1;
    batch["child_probs"]: [nodes, children], the teacher's probabilities of these tokens."""
    from distil.training.loss import cross_entropy_sum

    ids = batch["child_ids"]
    student = logits[batch["nodes"][:, None], ids.clamp(min=0)].masked_fill(ids < 0, NOTHING)
    teacher = batch["child_probs"].clamp(min=1e-6).log().masked_fill(ids < 0, NOTHING)
    return (1 - alpha) * cross_entropy_sum(logits, batch) + alpha * divergence(student, teacher, temperature)


def token_distillation_loss_sum(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], alpha: float, temperature: float
) -> torch.Tensor:
    """Return the same sum with a KL term for every token, over the teacher's K tokens and the rest as one class.
    logits: [tokens, vocabulary], float32, and batch["labels"]: [tokens]; batch["token_ids"]: [tokens, K], -1 for none;
    batch["token_log_probs"]: [tokens, K] and batch["token_rest"]: [tokens], the teacher's log-probabilities."""
    import torch

    labels, ids, teacher = batch["labels"][:, None], batch["token_ids"].long(), batch["token_log_probs"].float()
    none = (ids < 0) | (ids >= logits.shape[-1]) | teacher.isinf()
    ids = torch.where(none, ids[:, :1], ids).clamp(0, logits.shape[-1] - 1)
    student, right = logits.gather(1, torch.cat([ids, labels], dim=-1)).split([ids.shape[-1], 1], dim=-1)
    # Of the tokens that are left: 1 minus the sum of the K would be lost in rounding.
    rest = logits.scatter(1, ids, NOTHING).logsumexp(dim=-1, keepdim=True)
    student = torch.cat([student.masked_fill(none, NOTHING), rest], dim=-1)
    teacher = torch.cat([teacher.masked_fill(none, NOTHING), batch["token_rest"][:, None]], dim=-1).clamp(min=NOTHING)
    nll = (student.logsumexp(dim=-1, keepdim=True) - right).sum()
    return (1 - alpha) * nll + alpha * divergence(student, teacher, temperature)


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    data = read_data(args.data, ("input", "teacher_output"))
    by_token = any("token_probs" in row for row in data.rows)
    labels, probabilities = ([], []) if by_token else label_probabilities(data)
    with claimed(vars(args)):
        ref = resolve_student(args.student, args.adapter)
        data = data.for_model(ref.name)
        options = train_options(vars(args), SMALL, LARGE, ref, data, KdOptions)
        without = [] if labels or by_token else ["kd_alpha", "kd_temperature"]
        own = {"only for token_probs or label_probs, and --data has neither": without}
        own |= {"only with --kd_alpha above 0": [] if args.kd_alpha else ["kd_temperature"]}
        refuse_unused(parser, argv, own | unused(vars(args)))

        from distil.training import loss, run

        encoder = PromptEncoder(load_tokenizer(ref.path))
        dataset, sizes = completion_dataset(data, "teacher_output", encoder, options.max_length)
        sizes = replace(sizes, label_probs=bool(labels), token_probs=by_token)
        build = functools.partial(loss.completion_trainer, sizes=sizes)
        values = {"alpha": options.kd_alpha, "temperature": options.kd_temperature}
        if by_token:
            dataset, reader = with_token_probs(dataset, data)
            loss_sum = functools.partial(token_distillation_loss_sum, **values)
            build = functools.partial(build, loss_sum=loss_sum, token_probs=reader)
            if any("label_probs" in row for row in data.rows):
                print_note(f"{data.file}: label_probs are not used, since rows have token_probs")
        elif labels:
            dataset = with_label_nodes(dataset, encoder, labels, probabilities)
            build = functools.partial(build, loss_sum=functools.partial(distillation_loss_sum, **values))
        else:
            text = "no token_probs or label_probs, so --kd_alpha has no effect: teacher_output is imitated"
            print(f"{data.file}: {text}", file=sys.stderr)
        return run.plan_and_train("kd", options, ref, data, sizes, encoder, functools.partial(build, dataset=dataset))


if __name__ == "__main__":
    run_script(main)
