"""Run the command line as a module: `python -m hf_ftplus`, `accelerate launch -m hf_ftplus sft ...`."""

from hf_ftplus.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
