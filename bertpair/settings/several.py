"""Several runs at once: flags of train.py that are no settings of a model."""

from collections.abc import Iterator

from bertpair.settings.config import Config
from bertpair.settings.fields import Group, Path, Switch, Whole, setting


class SeveralRuns(Group):
    """What makes many runs of one, and which weights they leave."""

    sweep: Path = setting(
        None,
        "A file that says which settings to try and how. All are tried, and a table shows which is best. "
        "Running the same command again goes on; so does another process of it, at the same time.",
        example="sweep.yaml",
    )
    seeds: Whole | None = setting(
        None,
        "Run this many times with the seeds seed, seed + 1 and so on, and show the mean and the standard "
        "deviation. Not given: once.",
        ge=2,
        le=1000,
        example="5",
    )
    folds: Whole | None = setting(
        None,
        "Cut the training data into this many parts. Each is scored by a model that was trained on the "
        "others. Not given: no folds.",
        ge=2,
        le=1000,
        example="5",
    )
    keep_all_weights: Switch = setting(
        False,
        "Keep the weights of every run. Without this, seeds and a sweep leave those of the best run, and "
        "folds leave none.",
    )

    @property
    def is_asked(self) -> bool:
        """Whether there is more than a single run."""
        return bool(self.sweep or self.seeds or self.folds)


def seeds_fault(first: int, count: int) -> str | None:
    """What is wrong with so many seeds from `first` on, if anything is."""
    if 1 <= count <= 2**32 - first:
        return None
    return f"expected at least 1 seed and none above {2**32 - 1}, found {count} from {first} on"


def several_faults(several: SeveralRuns, config: Config) -> Iterator[str]:
    """What does not go together, a line each."""
    asked = [f"--{name}" for name in ("sweep", "seeds", "folds") if getattr(several, name)]
    if len(asked) > 1:
        hint = "; a sweep's file says how many seeds" if several.sweep and several.seeds else ""
        yield f"{' and '.join(asked)} are different kinds of several runs: give only one{hint}"
    if several.keep_all_weights and not asked:
        yield "--keep_all_weights has no effect without --sweep, --seeds or --folds"
    if asked and config.resume:
        yield f"--resume: with {asked[0]}, running the same command again goes on; leave --resume out"
    if asked and not config.runs_training:
        yield f"do_eval alone trains nothing; {asked[0]} needs training"
    if several.seeds and not config.runs_evaluation:
        yield "do_train alone measures nothing; --seeds needs do_eval too"
    if several.seeds and (fault := seeds_fault(config.seed, several.seeds)):
        yield f"--seeds: {fault}"
