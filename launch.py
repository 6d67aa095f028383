"""The entry: Hydra composes conf/, mergeflow does it. `python launch.py --help` shows how."""

from mergeflow.config.cli import main

if __name__ == "__main__":
    main()
