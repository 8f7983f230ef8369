"""The names that run_glue.py had in 2020 and bertpair's settings do not: what each means now.

A name either stands for a setting of today, or is said, in one line, to mean nothing any more.
"""

from typing import Any

from pydantic import create_model

from bertpair.settings.fields import RETIRED, Group, Switch, Whole, setting

_GONE = "no longer means anything: ignored"
IGNORED = {
    "fp16_opt_level": f"{_GONE} (amp has no levels)",
    "local_rank": f"{_GONE} (torchrun tells each process which one it is)",
    "server_ip": _GONE,
    "server_port": _GONE,
    "logging_dir": f"{_GONE} (metrics go to metrics.jsonl in output_dir)",
    "logging_first_step": _GONE,
    "tpu_num_cores": f"{_GONE} (there is no TPU support)",
    "tpu_metrics_debug": f"{_GONE} (there is no TPU support)",
    "debug": _GONE,
    "dataloader_drop_last": f"{_GONE} (every row counts, those of a smaller last batch too)",
    "past_index": _GONE,
    **RETIRED,
}
ELSEWHERE = {
    "do_predict": "is ignored here: {evaluate} --predict --data_file FILE does it",
    "eval_all_checkpoints": "is ignored here: {evaluate} --all_checkpoints does it",
}


class OldNames(create_model("Ignored", __base__=Group, **dict.fromkeys(IGNORED, (Any, None)))):  # type: ignore[misc]
    """Every old name, and what may stand there. Trainer's own default for per_gpu_… was null."""

    per_gpu_train_batch_size: Whole | None = setting(None, "", ge=1)
    per_gpu_eval_batch_size: Whole | None = setting(None, "", ge=1)
    fp16: Switch = False
    no_cuda: Switch = False
    do_predict: Switch = False
    eval_all_checkpoints: Switch = False


def translate(name: str, value: Any, script: str) -> tuple[dict[str, Any], str]:
    """What an old name with this (sound) value means: settings of today, and what to say of it or nothing.

    In what is said, {evaluate} stands for the command that evaluates.
    """
    if name in IGNORED:
        return {}, IGNORED[name]
    if value in (None, False):
        return {}, ""
    if name in ELSEWHERE and script == "train":
        return {}, ELSEWHERE[name]
    setting, meaning = {
        "fp16": ("amp", "fp16"),
        "no_cuda": ("device", "cpu"),
        "do_predict": ("predict", True),
        "eval_all_checkpoints": ("all_checkpoints", True),
    }.get(name) or (name.replace("gpu", "device"), value)
    return {setting: meaning}, ""
