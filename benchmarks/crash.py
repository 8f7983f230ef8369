"""The proof that nothing is lost: trainings killed, writes failed, files damaged; each compared to the bit.

    python benchmarks/crash.py --kills 100 [--amp bf16]    SIGKILL at drawn moments, resumed until done
    python benchmarks/crash.py --faults                    the k-th system call of a save fails, for every k
    python benchmarks/crash.py --flips                     a checkpoint's files flipped, cut, emptied, swapped

Each run is a small real training in a forked process. Exit code 0 only if every single one came out right.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process must not need another's threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import torch
import torch._dynamo  # loaded by the first optimizer; once here rather than in each child
from crash_child import kill_here, make_material, stop_twice
from crash_faults import try_faults
from crash_flips import try_flips
from crash_kills import try_kills

from bertpair.evaluation.plots import draw_confusion
from bertpair.runtime import cpu_bf16_flag


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    draw_confusion(np.eye(2, dtype=np.int64), ["a", "b"])  # loads matplotlib and its fonts
    print(machine(arguments.amp), flush=True)
    if arguments.amp == "bf16" and cpu_bf16_flag() is None:
        print("this processor has no fast bf16 instructions: torch computes it the slow way")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bertpair-crash-") as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        settings = make_material(folder / "material", amp=arguments.amp)
        ok = True
        if arguments.kills:
            kill = stop_twice if arguments.stop_twice else kill_here
            ok &= try_kills(arguments.kills, settings, folder, kill, arguments.seed, say)
        if arguments.faults:
            ok &= try_faults(settings, folder, arguments.every, say)
        if arguments.flips:
            ok &= try_flips(settings, folder, arguments.every, arguments.seed, say)
    print(f"{time.monotonic() - started:.0f} s")
    return 0 if ok else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, metavar="N", help="runs that are killed at least once each")
    parser.add_argument("--stop_twice", action="store_true", help="kill by SIGTERM, twice, where drawn")
    parser.add_argument("--faults", action="store_true", help="failing system calls")
    parser.add_argument("--flips", action="store_true", help="damaged files")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th fault or flip")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="precision of the trainings")
    parser.add_argument("--seed", type=int, default=1, help="of the drawn moments and bits")
    memory = Path("/dev/shm")  # a killed process leaves the system's memory alone: no disk is needed
    default = memory if os.access(memory, os.W_OK) else None
    parser.add_argument("--folder", type=Path, default=default, help="where to work (default: in memory)")
    arguments = parser.parse_args()
    if not (arguments.kills or arguments.faults or arguments.flips):
        parser.error("say --kills N, --faults or --flips")
    return arguments


def machine(amp: str) -> str:
    where = f"{platform.platform()}, {os.cpu_count()} cores, CPU"
    return f"{date.today()}, {where}, torch {torch.__version__}, amp {amp}"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
