"""`python -m explaind_track`: the command `explaind-track`, where that is not on the path."""

from explaind_track.cli.main import main

if __name__ == "__main__":
    main(prog_name="explaind-track")
