"""Serve a trained model over HTTP: `python serve.py --help`. The same as `bertpair serve`."""

from bertpair.__main__ import main

if __name__ == "__main__":
    main("serve")
