"""How a trained model computes its answers, in evaluate.py and in serve.py."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from bertpair.settings.fields import Group, Path, as_number, said, setting


def _stored_or(low: float, high: float) -> Any:
    def check(value: object) -> object:
        number = as_number(value)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if value != "stored" and not (is_number and low <= number <= high):  # type: ignore[operator]
            raise ValueError
        return float(number) if is_number else value  # type: ignore[arg-type]

    return PlainValidator(check)


Temperature = Annotated[
    float | Literal["stored"], _stored_or(0.01, 100), said("stored, or a number from 0.01 to 100")
]
Threshold = Annotated[float | Literal["stored"], _stored_or(0, 1), said("stored, or a number from 0 to 1")]


class EngineSettings(Group):
    """What computes, what a model in 8-bit integers is made with, and how its outputs become answers."""

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

    temperature: Temperature | None = setting(
        None,
        "Number that the model's outputs are divided by before they become probabilities; labels stay the "
        "same. stored: the one that evaluate.py --fit_temperature found. Not given: none, as in training.",
        resume="free",
        example="stored",
    )
    threshold: Threshold | None = setting(
        None,
        "With two labels: the probability of positive_label from which that is the answer. stored: the one "
        "that evaluate.py --fit_threshold found. Not given: the label with the higher probability.",
        resume="free",
        example="stored",
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
