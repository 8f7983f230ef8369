"""Measure a trained model on a data file: `python evaluate.py --help`. The same as `bertpair evaluate`."""

from bertpair.__main__ import main

if __name__ == "__main__":
    main("evaluate")
