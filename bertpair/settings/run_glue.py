"""The names that run_glue.py had in 2020 and bertpair's settings do not: what each means now.

A name either stands for a setting of today, or is said, in one line, to mean nothing any more.
"""

from bertpair.settings.values import SWITCH, Kind, first_word, matching, or_null, whole

_ANYTHING = Kind("a value", lambda value: value)
_BATCH = or_null(whole(1))  # Trainer's own default for per_gpu_… was null
_MODEL_TYPE = matching("bert, the only type for now", "(?i:bert)")
_SWITCH_ONCE = Kind(
    "a value or none", lambda value: value, lambda words: first_word(words) if words else True, "maybe"
)

RENAMED = {
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
# A switch that was on stands for a setting and its value; in evaluate.py there are two more.
SWITCHED: dict[str, tuple[str, object]] = {"fp16": ("amp", "fp16"), "no_cuda": ("device", "cpu")}
SWITCHED_IN_EVALUATE: dict[str, tuple[str, object]] = {
    "do_predict": ("predict", True),
    "eval_all_checkpoints": ("all_checkpoints", True),
}
ELSEWHERE = {
    "do_predict": "is done by evaluate.py --predict --data_file FILE: ignored here",
    "eval_all_checkpoints": "is done by evaluate.py --all_checkpoints: ignored here",
}
_GONE = "no longer means anything: ignored"
IGNORED = {
    "fp16_opt_level": f"{_GONE} (amp has no levels)",
    "local_rank": f"{_GONE} (one process trains, on one device)",
    "server_ip": _GONE,
    "server_port": _GONE,
    "logging_dir": f"{_GONE} (metrics go to metrics.jsonl in output_dir)",
    "logging_first_step": _GONE,
    "tpu_num_cores": f"{_GONE} (there is no TPU support)",
    "tpu_metrics_debug": f"{_GONE} (there is no TPU support)",
    "debug": _GONE,
    "dataloader_drop_last": f"{_GONE} (every row counts, those of a smaller last batch too)",
    "past_index": _GONE,
}
_OLD_SWITCHES = ("logging_first_step", "tpu_metrics_debug", "debug", "dataloader_drop_last")

OLD_KINDS: dict[str, Kind] = {
    "model_type": _MODEL_TYPE,
    **dict.fromkeys(RENAMED, _BATCH),
    **dict.fromkeys([*SWITCHED, *SWITCHED_IN_EVALUATE], SWITCH),
    **{name: _SWITCH_ONCE if name in _OLD_SWITCHES else _ANYTHING for name in IGNORED},
}


def translate(name: str, value: object, script: str) -> tuple[dict[str, object], str]:
    """What an old name with this (sound) value means: settings of today, and what to say of it or nothing."""
    if name in RENAMED:
        return ({} if value is None else {RENAMED[name]: value}), ""
    switched = SWITCHED | (SWITCHED_IN_EVALUATE if script == "evaluate" else {})
    if name in switched:
        today, meaning = switched[name]
        return ({today: meaning} if value else {}), ""
    if name in ELSEWHERE:
        return {}, ELSEWHERE[name] if value else ""
    return {}, IGNORED.get(name, "")
