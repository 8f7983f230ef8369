"""Fine-tune a BERT on pairs of texts: `python train.py --help`. The same as `bertpair train`."""

from bertpair.__main__ import main

if __name__ == "__main__":
    main("train")
