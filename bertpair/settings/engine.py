"""How a trained model computes its answers, in evaluate.py and in serve.py."""

from collections.abc import Iterator
from typing import Literal

from bertpair.settings.fields import Group, Path, setting


class EngineSettings(Group):
    """The engine of a trained model, and what a model in 8-bit integers is made with."""

    engine: Literal["torch", "openvino"] | None = setting(
        None,
        "What computes the answers. openvino runs on a CPU only and needs the extra bertpair[openvino]. "
        "Not given: torch, or openvino with quantize int8.",
        resume="free",
        example="openvino",
    )
    quantize: Literal["int8"] | None = setting(
        None,
        "int8: compute the linear layers in 8-bit integers, with the engine openvino. The first start "
        "converts the model, which takes minutes for a large one. Not given: as amp says.",
        resume="free",
        example="int8",
    )
    calibration_file: Path = setting(
        None,
        "File laid out like the training data. 200 of its rows show int8 how large numbers become. "
        "Not given: the training file.",
        resume="free",
        example="my_train.tsv",
    )
    quantize_check: Path = setting(
        None,
        "File laid out like the training data, with 256 rows or more. The answers for its first 256 rows are "
        "compared with those in float32. Not given: with quantize int8, further rows of the calibration "
        "file; otherwise nothing is compared.",
        resume="free",
        example="my_dev.tsv",
    )

    @property
    def runs_openvino(self) -> bool:
        return self.engine == "openvino" or (self.engine is None and self.quantize is not None)


def engine_faults(c: EngineSettings, device: str) -> Iterator[str]:
    """What of these cannot stand together."""
    if c.engine == "torch" and c.quantize:
        yield f"quantize {c.quantize} needs engine openvino, found engine torch"
    if c.runs_openvino and device not in ("auto", "cpu"):
        yield f"engine openvino runs on the CPU only, found device {device}"
    if c.calibration_file and not c.quantize:
        yield "calibration_file has no effect without quantize int8"
