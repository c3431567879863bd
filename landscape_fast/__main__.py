"""`python -m landscape_fast` is `landscape-fast show-config`; with arguments, `landscape-fast`."""
import sys

from landscape_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["show-config"]))
