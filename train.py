"""Train a small language model: `python train.py --help` lists what can be asked of it."""

from slm.cli import main

if __name__ == "__main__":
    main()
