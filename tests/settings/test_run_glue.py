"""Names of 2020: each still means something, or says that it does not."""

import pytest

from bertpair.settings.config import SETTINGS
from bertpair.settings.run_glue import IGNORED, OldNames, translate

ARGPARSE_ERA = """data_dir model_type model_name_or_path task_name output_dir config_name
        tokenizer_name cache_dir max_seq_length do_train do_eval evaluate_during_training do_lower_case
        per_gpu_train_batch_size per_gpu_eval_batch_size gradient_accumulation_steps learning_rate
        weight_decay adam_epsilon max_grad_norm num_train_epochs max_steps warmup_steps logging_steps
        save_steps eval_all_checkpoints no_cuda overwrite_output_dir overwrite_cache seed fp16
        fp16_opt_level local_rank server_ip server_port""".split()
TRAINER_ERA = """do_predict per_device_train_batch_size per_device_eval_batch_size logging_dir
        logging_first_step save_total_limit tpu_num_cores tpu_metrics_debug debug dataloader_drop_last
        eval_steps past_index""".split()


@pytest.mark.parametrize("name", ARGPARSE_ERA + TRAINER_ERA)
def test_every_flag_of_run_glue_is_known(name: str) -> None:
    assert (name in SETTINGS) != (name in OldNames.model_fields)


def test_what_old_names_mean() -> None:
    assert translate("fp16", True, "train") == ({"amp": "fp16"}, "")
    assert translate("fp16", False, "train") == ({}, "")
    assert translate("no_cuda", True, "train") == ({"device": "cpu"}, "")
    assert translate("per_gpu_train_batch_size", 8, "train") == ({"per_device_train_batch_size": 8}, "")
    assert translate("per_gpu_eval_batch_size", 8, "train") == ({"per_device_eval_batch_size": 8}, "")
    assert translate("per_gpu_eval_batch_size", None, "train") == ({}, "")


def test_evaluation_moved_to_its_own_script() -> None:
    meaning, note = translate("eval_all_checkpoints", True, "train")
    assert not meaning and "{evaluate} --all_checkpoints" in note
    assert translate("eval_all_checkpoints", True, "evaluate") == ({"all_checkpoints": True}, "")
    assert "{evaluate} --predict" in translate("do_predict", True, "train")[1]
    assert translate("do_predict", True, "evaluate") == ({"predict": True}, "")
    assert translate("do_predict", False, "train") == ({}, "")


@pytest.mark.parametrize("name", sorted(OldNames.model_fields))
def test_what_an_old_name_stands_for_is_a_setting(name: str) -> None:
    for value in (True, 8):
        meaning, _ = translate(name, value, "evaluate")
        assert meaning.keys() <= SETTINGS.keys()


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_nothing_is_swallowed(name: str) -> None:
    meaning, note = translate(name, "1", "train")
    assert not meaning and note.startswith("no longer means anything")
